/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What the balancer at XDP needs to know of devices. Part of map family `lb`; services/lb/xdp/ writes it. */
#pragma once

#include "abi/lb.h"

#define LB_XDP_MACS 4

/* One element. MACs of the devices it hangs on, first byte lowest; 0: none. Frames for other machines, which a
 * device may see as well, are not balanced. */
struct lb_xdp {
	__u64 macs[LB_XDP_MACS];
	/* Not 0: frames leave by redirection also where they came by. A veth does not wake its other end for XDP_TX unless a
	 * program hangs there, too. */
	__u32 redirect;
	__u32 pad;
};
_Static_assert(sizeof(struct lb_xdp) == 40, "ABI");

/* A device that takes frames redirected to it. */
struct lb_xdp_port {
	__u64 mac;
};

/* Indexes of lb_xdp_tails: what fib_lb_xdp goes on to. */
enum lb_xdp_tail {
	LB_XDP_V4 = 0,
	LB_XDP_V6 = 1,
};

FIB_MAP("array", __u32, struct lb_xdp, lb_xdp, 1, 0);
FIB_MAP("prog", __u32, __u32, lb_xdp_tails, 2, 0);
/* By interface index. */
FIB_MAP("hash", __u32, struct lb_xdp_port, lb_xdp_ports, 256, 0);
