"""etcd: calls (client), many as one (batch), watches (watch), leases kept alive (lease), a server of our own (embedded)."""
