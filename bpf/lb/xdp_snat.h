/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Translation of both ends: the backend sees the node, and answers to it. */
#pragma once

#include <uapi/linux/if_ether.h>
#include "lb/flow.h"
#include "lb/xdp_nat.h"
#include "lb/xdp_route.h"

/* Towards `dst` from `src`, one hop less, by `hop`. The caller has found ttl above one. */
static __always_inline int snat_send(struct xdp_md *ctx, bool v4, const struct xdp_packet *packet, const struct fib_addr *src,
				     const struct fib_addr *dst, __be16 sport, __be16 dport, const struct xdp_hop *hop)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	void *ip = data + ETH_HLEN, *l4 = ip + xdp_ip_len(v4);
	__u64 change = csum_change(packet->src.w[3], src->w[3]) + csum_change(packet->dst.w[3], dst->w[3]);
	__u32 ports = (__u32)dport << 16 | sport;
	__u16 *check;

	/* Never so: it was parsed. */
	if (l4 + (packet->proto == IPPROTO_TCP ? XDP_TCP_LEN : XDP_UDP_LEN) > end)
		return XDP_DROP;
	if (v4) {
		__u16 *halves = ip;

		halves[5] = csum_apply(halves[5], change + csum_change(halves[4], halves[4] - 1));
		((__u8 *)ip)[8]--;
		((__be32 *)ip)[3] = src->w[3];
		((__be32 *)ip)[4] = dst->w[3];
	} else {
#pragma unroll
		for (int at = 0; at < 3; at++)
			change += csum_change(packet->src.w[at], src->w[at]) + csum_change(packet->dst.w[at], dst->w[at]);
		((__u8 *)ip)[7]--;
		__builtin_memcpy(ip + 8, src, sizeof(*src));
		__builtin_memcpy(ip + 24, dst, sizeof(*dst));
	}
	change += csum_change(*(__u32 *)l4, ports);
	*(__u32 *)l4 = ports;
	if (packet->proto == IPPROTO_TCP) {
		check = l4 + 16;
		*check = csum_apply(*check, change);
	} else {
		check = l4 + 6;
		/* 0 says that there is none. */
		if (*check) {
			*check = csum_apply(*check, change);
			*check = *check ? *check : 0xffff;
		}
	}
	xdp_address(data, hop, v4);
	return xdp_leave(ctx, hop);
}
