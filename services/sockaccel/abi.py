FAMILY = "sockaccel/v1"
MAPS = {name: f"{FAMILY}/{name}" for name in ("sa_socks","sa_pairs","sa_mine","sa_opening","sa_config","sa_spaces","sa_ports","sa_uids","sa_groups","sa_hosts","sa_off","sa_stats","sa_events")}
