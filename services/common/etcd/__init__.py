"""etcd: calls (client), many of them together (batch), watches (watch), leases kept alive (lease), a server of our own (embedded)."""
