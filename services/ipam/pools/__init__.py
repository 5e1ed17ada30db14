"""Addresses: pools and blocks in etcd, allocations on this node."""
