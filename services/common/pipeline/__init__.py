"""The data path as user space knows it: ABI, installation, endpoint tables, events, counters."""
