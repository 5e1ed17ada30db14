"""Which sources the node's uplinks take packets from, and how many a second."""
