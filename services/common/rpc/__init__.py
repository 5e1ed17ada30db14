"""gRPC servers and channels as Fibril uses them."""
