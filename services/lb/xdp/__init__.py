"""The balancer's fast path at XDP: its attachment and what it must know of devices."""
