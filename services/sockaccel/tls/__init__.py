"""TLS made visible: request lines and status lines of chosen pods, seen where the TLS library is called."""
