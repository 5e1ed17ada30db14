/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Direct server return: the client's packet as it is, in IP, to the backend; its answer goes straight to the client.
 * The backend's port travels in the outer header, for a node that translates for its pod: IPv4 identification, IPv6
 * flow label. */
#pragma once

#include "lb/xdp_route.h"

#define DSR_TTL 64
#define DSR_DONT_FRAGMENT 0x4000

static __always_inline void dsr_header_v4(__u32 *ip, const struct xdp_packet *packet, __be32 from, __be32 to, __be16 port)
{
	__u32 first = bpf_htonl(0x45u << 24 | (__u32)packet->tos << 16 | (packet->len + XDP_V4_LEN));
	__u32 second = (__u32)bpf_htons(DSR_DONT_FRAGMENT) << 16 | port;
	__u32 third = IPPROTO_IPIP << 8 | DSR_TTL;
	__u64 sum = (__u64)first + second + third + from + to;

	ip[0] = first;
	ip[1] = second;
	ip[2] = (__u32)(__u16)~csum_fold(sum) << 16 | third;
	ip[3] = from;
	ip[4] = to;
}

static __always_inline void dsr_header_v6(void *ip, const struct xdp_packet *packet, const struct fib_addr *from,
					  const struct fib_addr *to, __be16 port)
{
	__u32 *words = ip;

	words[0] = bpf_htonl(6u << 28 | (__u32)packet->tos << 20 | bpf_ntohs(port));
	words[1] = bpf_htonl((__u32)packet->len << 16 | IPPROTO_IPV6 << 8 | DSR_TTL);
	__builtin_memcpy(ip + 8, from, sizeof(*from));
	__builtin_memcpy(ip + 24, to, sizeof(*to));
}

/* Where a backend's packets go next. `own` is the MAC of the device the frame came by. */
static __always_inline bool dsr_hop(struct xdp_md *ctx, bool v4, const struct lb_config *config,
				    const struct lb_backend *backend, __u32 len, __u64 own, struct xdp_hop *hop)
{
	struct fib_addr from;
	__u64 known;

	if (likely(backend->flags & LB_BE_TX)) {
		/* MAC and MTU are one word. */
		known = *(volatile __u64 *)backend->mac;
		if (len > known >> 48)
			return false;
		hop->to = known & XDP_MAC;
		hop->from = own;
		hop->ifindex = 0;
		return likely(backend->ifindex == ctx->ingress_ifindex) || xdp_port(backend->ifindex, hop);
	}
	xdp_node(config, v4, &from);
	return xdp_route(ctx, v4, config, &from, &backend->addr, v4 ? IPPROTO_IPIP : IPPROTO_IPV6, len, hop);
}

/* The packet goes out, or to tc as it came. */
static __always_inline int dsr_send(struct xdp_md *ctx, bool v4, const struct lb_config *config,
				    const struct lb_backend *backend, __be16 port, const struct xdp_packet *packet,
				    const struct xdp_hop *hop)
{
	__u32 header = xdp_ip_len(v4);
	void *data;

	if (bpf_xdp_adjust_head(ctx, -(int)header))
		return XDP_PASS;
	data = (void *)(long)ctx->data;
	/* Never so: there was room for the frame, and now for more. */
	if (data + ETH_HLEN + XDP_V6_LEN > (void *)(long)ctx->data_end)
		return XDP_DROP;
	xdp_address(data, hop, v4);
	if (v4)
		dsr_header_v4(data + ETH_HLEN, packet, config->snat_v4, backend->addr.w[3], port);
	else
		dsr_header_v6(data + ETH_HLEN, packet, &config->snat_v6, &backend->addr, port);
	return xdp_leave(ctx, hop);
}
