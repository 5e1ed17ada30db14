/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Which frontend a destination is: for programs of all hooks. */
#pragma once

#include "abi/lb.h"

static __always_inline void lb_front_any(struct fib_addr *addr, bool v4)
{
	addr->q[0] = 0;
	addr->q[1] = v4 ? (__u64)bpf_htonl(0xffff) : 0;
}

/* By its range of ports. */
static __always_inline struct lb_front *lb_front_range(const struct fib_addr *addr, __be16 port, __u8 proto)
{
	struct lb_range_key key = { .bits = 160, .proto = bpf_htons(proto), .port = port };

	__builtin_memcpy(key.addr, addr->w, sizeof(key.addr));
	return lb_ranges.lookup(&key);
}

/* The frontend at an address, whose hint is given, and port, or null. */
static __always_inline struct lb_front *lb_front_hinted(__u32 hint, const struct fib_addr *addr, __be16 port, __u8 proto)
{
	__u32 zero = 0;
	struct lb_front_key key = { .port = port, .proto = proto };
	struct lb_front *front, *mark;
	void *inner;

	if (likely(!(hint & (LB_HINT_VIP | LB_HINT_NODE))) || !port)
		return 0;
	inner = lb_fronts.lookup(&zero);
	if (!inner)
		return 0;
	key.addr = *addr;
	front = bpf_map_lookup_elem_((uintptr_t)inner, &key);
	if (likely(front))
		return front;
	if (hint & LB_HINT_RANGE) {
		front = lb_front_range(addr, port, proto);
		if (front)
			return front;
	}
	if (!(hint & LB_HINT_NODE))
		return 0;
	/* Node ports have the unspecified address; a hint alone does not make an address the node's. */
	key.port = 0;
	key.proto = 0;
	mark = bpf_map_lookup_elem_((uintptr_t)inner, &key);
	if (!mark || !(mark->flags & LB_FRONT_NODE))
		return 0;
	lb_front_any(&key.addr, fib_addr_is_v4(addr));
	key.port = port;
	key.proto = proto;
	front = bpf_map_lookup_elem_((uintptr_t)inner, &key);
	return front ? front : lb_front_range(&key.addr, port, proto);
}

/* The same where the hint is not known yet. What is no frontend costs one lookup in an array, unless its address has the
 * hint of one. */
static __always_inline struct lb_front *lb_front_find(const struct fib_addr *addr, __be16 port, __u8 proto)
{
	return lb_front_hinted(lb_hint(addr), addr, port, proto);
}

/* The port a backend gets a packet for `vport` at: as far above the backend's as vport is above the range's first. */
static __always_inline __be16 lb_front_port(const struct lb_front *front, const struct lb_backend *backend, __be16 vport)
{
	return bpf_htons(bpf_ntohs(backend->port) + bpf_ntohs(vport) - front->first);
}
