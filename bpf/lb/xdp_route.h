/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The way out of XDP: the next hop's MAC and the device towards it. */
#pragma once

#include <uapi/linux/if_ether.h>
#include <uapi/linux/bpf.h>
#include "abi/xdp.h"
#include "lb/xdp_packet.h"

#define XDP_AF_INET 2
#define XDP_AF_INET6 10

/* MACs in the low 48 bits, first byte lowest. */
struct xdp_hop {
	__u64 to;
	__u64 from;
	__u32 ifindex; /* 0: the device the frame came by */
};

/* The node's address towards backends. */
static __always_inline void xdp_node(const struct lb_config *config, bool v4, struct fib_addr *node)
{
	if (v4)
		fib_addr_set_v4(node, config->snat_v4);
	else
		*node = config->snat_v6;
}

static __always_inline bool xdp_has_node(const struct lb_config *config, bool v4)
{
	return v4 ? config->snat_v4 : config->snat_v6.q[0] | config->snat_v6.q[1];
}

/* A device other than the one the frame came by: whether it takes frames from XDP, and its MAC. */
static __always_inline bool xdp_port(__u32 ifindex, struct xdp_hop *hop)
{
	struct lb_xdp_port *port = lb_xdp_ports.lookup(&ifindex);

	if (!port)
		return false;
	hop->from = port->mac;
	hop->ifindex = ifindex;
	return true;
}

/* What a lookup in the host's routes gave, for the rest of its beat: an IPv6 lookup takes as long as all else together. */
struct xdp_route {
	struct fib_addr src;
	struct fib_addr dst;
	__u64 to; /* and the largest packet above its 48 bits */
	__u64 from;
	__u32 ifindex;
	__u32 ingress;
	__u32 beat;
	__u32 proto;
};

#define XDP_ROUTES_BITS 9

FIB_MAP("percpu_array", __u32, struct xdp_route, xdp_routes, 1 << XDP_ROUTES_BITS, 0);

static __always_inline __u64 xdp_mac(const __u8 *mac)
{
	const __u16 *halves = (const __u16 *)mac;

	return halves[0] | (__u64)halves[1] << 16 | (__u64)halves[2] << 32;
}

/* Asks the host's routes. False: the packet must go another way (no neighbour, not to be forwarded). */
static __always_inline bool xdp_route_ask(struct xdp_md *ctx, bool v4, __u32 len, struct xdp_route *route)
{
	struct bpf_fib_lookup fib = { .family = v4 ? XDP_AF_INET : XDP_AF_INET6, .l4_protocol = route->proto, .tot_len = len };

	fib.ifindex = route->ingress;
	if (v4) {
		fib.ipv4_src = route->src.w[3];
		fib.ipv4_dst = route->dst.w[3];
	} else {
		__builtin_memcpy(fib.ipv6_src, &route->src, sizeof(route->src));
		__builtin_memcpy(fib.ipv6_dst, &route->dst, sizeof(route->dst));
	}
	if (bpf_fib_lookup(ctx, &fib, sizeof(fib), 0) != BPF_FIB_LKUP_RET_SUCCESS)
		return false;
	route->from = xdp_mac(fib.smac);
	/* tot_len and the route's MTU are one field. */
	route->to = xdp_mac(fib.dmac) | (__u64)fib.tot_len << 48;
	route->ifindex = fib.ifindex;
	return true;
}

/* By the host's routes. `len` is what the packet will have. False: it must go another way (no neighbour, too big, not
 * to be forwarded, a device that XDP cannot send by). */
static __always_inline bool xdp_route(struct xdp_md *ctx, bool v4, const struct lb_config *config, const struct fib_addr *src,
				      const struct fib_addr *dst, __u8 proto, __u32 len, struct xdp_hop *hop)
{
	__u32 index = (dst->w[3] ^ dst->w[2] * 3 ^ dst->w[0] * 5) * 0x9e3779b1 >> (32 - XDP_ROUTES_BITS);
	struct xdp_route *route = xdp_routes.lookup(&index);
	__u32 ingress = ctx->ingress_ifindex, beat = lb_beat(config);

	if (!route)
		return false;
	if (unlikely(route->beat != beat || !fib_addr_same(&route->dst, dst) || !fib_addr_same(&route->src, src) ||
		     route->ingress != ingress || route->proto != proto)) {
		route->src = *src;
		route->dst = *dst;
		route->ingress = ingress;
		route->proto = proto;
		route->beat = 0;
		if (!xdp_route_ask(ctx, v4, len, route))
			return false;
		route->beat = beat;
	}
	if (unlikely(len > route->to >> 48))
		return false;
	hop->from = route->from;
	hop->to = route->to & XDP_MAC;
	hop->ifindex = 0;
	return likely(route->ifindex == ingress) || xdp_port(route->ifindex, hop);
}

/* The frame's Ethernet header. */
static __always_inline void xdp_address(void *data, const struct xdp_hop *hop, bool v4)
{
	*(__u64 *)data = hop->to | hop->from << 48;
	*(__u32 *)(data + 8) = hop->from >> 16;
	*(__be16 *)(data + 12) = v4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
}

static __always_inline int xdp_leave(struct xdp_md *ctx, const struct xdp_hop *hop)
{
	__u32 zero = 0;
	struct lb_xdp *own = lb_xdp.lookup(&zero);

	lb_count(LB_STAT_XDP_TX);
	if (unlikely(hop->ifindex))
		return bpf_redirect(hop->ifindex, 0);
	return likely(own && !own->redirect) ? XDP_TX : bpf_redirect(ctx->ingress_ifindex, 0);
}
