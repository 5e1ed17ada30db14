"""Load balancing at sockets: programs on a control group, and the end of connections to backends that are gone."""
