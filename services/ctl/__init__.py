"""The `fibril` command and the supervisor of a node. A client like any other: what it shows, it asks over
gRPC."""
