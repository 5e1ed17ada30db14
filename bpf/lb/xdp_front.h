/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Frontends that packets asked for lately, as lb_front_hinted found them: a new connection is spared a hash or three. They are
 * good until a frontend changes, or the stamp does, should somebody have changed one and died before he said so. */
#pragma once

#include "lb/front.h"

#define XDP_FRONTS_BITS 8

struct xdp_front {
	struct fib_addr addr;
	__be16 port;
	__u16 proto;
	__u32 epoch; /* lb_config's */
	__u32 stamp;
	__u32 pad;
	struct lb_front front;
};

FIB_MAP("percpu_array", __u32, struct xdp_front, xdp_fronts, 1 << XDP_FRONTS_BITS, 0);

/* As lb_front_hinted. `now` is flow_now(). */
static __always_inline struct lb_front *xdp_front_find(const struct lb_config *config, __u32 hint, const struct fib_addr *addr,
						       __be16 port, __u8 proto, __u32 now)
{
	/* Read before the frontend is: of a change meanwhile the next packet learns. */
	__u32 epoch = *(volatile __u32 *)&config->epoch;
	__u32 index = (addr->w[3] ^ port * 3) * 0x9e3779b1 >> (32 - XDP_FRONTS_BITS);
	struct xdp_front *known = xdp_fronts.lookup(&index);
	struct lb_front *front;

	if (known && likely(known->epoch == epoch && known->stamp == now && known->port == port && known->proto == proto &&
			    fib_addr_same(&known->addr, addr)))
		return &known->front;
	front = lb_front_hinted(hint, addr, port, proto);
	if (!front || !known || hint & LB_HINT_RANGE)
		return front;
	known->addr = *addr;
	known->port = port;
	known->proto = proto;
	known->epoch = epoch;
	known->stamp = now;
	known->front = *front;
	return front;
}
