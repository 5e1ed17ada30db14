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

/* By the host's routes. `len` is what the packet will have. False: it must go another way (no neighbour, too big, not
 * to be forwarded, a device that XDP cannot send by). */
static __always_inline bool xdp_route(struct xdp_md *ctx, bool v4, const struct fib_addr *src, const struct fib_addr *dst,
				      __u8 proto, __u32 len, struct xdp_hop *hop)
{
	struct bpf_fib_lookup fib = { .family = v4 ? XDP_AF_INET : XDP_AF_INET6, .l4_protocol = proto, .tot_len = len };
	__u32 ingress = ctx->ingress_ifindex;

	fib.ifindex = ingress;
	if (v4) {
		fib.ipv4_src = src->w[3];
		fib.ipv4_dst = dst->w[3];
	} else {
		__builtin_memcpy(fib.ipv6_src, src, sizeof(*src));
		__builtin_memcpy(fib.ipv6_dst, dst, sizeof(*dst));
	}
	if (bpf_fib_lookup(ctx, &fib, sizeof(fib), 0) != BPF_FIB_LKUP_RET_SUCCESS)
		return false;
	/* smac and dmac are neighbours at the end of the structure. */
	hop->from = ((__u16 *)fib.smac)[0] | (__u64)((__u16 *)fib.smac)[1] << 16 | (__u64)((__u16 *)fib.smac)[2] << 32;
	hop->to = ((__u16 *)fib.dmac)[0] | (__u64)((__u16 *)fib.dmac)[1] << 16 | (__u64)((__u16 *)fib.dmac)[2] << 32;
	hop->ifindex = 0;
	return likely(fib.ifindex == ingress) || xdp_port(fib.ifindex, hop);
}

/* The frame's Ethernet header. */
static __always_inline void xdp_address(void *data, const struct xdp_hop *hop, bool v4)
{
	*(__u64 *)data = hop->to | hop->from << 48;
	*(__u32 *)(data + 8) = hop->from >> 16;
	*(__be16 *)(data + 12) = v4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
}

static __always_inline int xdp_leave(const struct xdp_hop *hop)
{
	lb_count(LB_STAT_XDP_TX);
	return likely(!hop->ifindex) ? XDP_TX : bpf_redirect(hop->ifindex, 0);
}
