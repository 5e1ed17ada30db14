"""etcd: calls (client), watches (watch), leases kept alive (lease), a server of our own (embedded)."""
