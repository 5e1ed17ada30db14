/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What XDP takes of a packet: TCP or UDP behind a bare IP header. All else is left to tc, which can do everything. */
#pragma once

#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include "abi/addr.h"
#include "lib/csum.h"
#include "lib/likely.h"

#define XDP_V4_LEN 20
#define XDP_V6_LEN 40
#define XDP_TCP_LEN 20
#define XDP_UDP_LEN 8
#define XDP_SYN 0x02
#define XDP_ENDS 0x05 /* FIN, RST */
#define XDP_MAC 0xffffffffffffull

struct xdp_packet {
	struct fib_addr src;
	struct fib_addr dst;
	__be16 sport;
	__be16 dport;
	__u16 len; /* of the IP packet, host order: what follows it in the frame is padding */
	__u8 proto;
	__u8 tcp_flags;
	__u8 ttl;
	__u8 tos; /* or traffic class */
};

static __always_inline __u32 xdp_ip_len(bool v4)
{
	return v4 ? XDP_V4_LEN : XDP_V6_LEN;
}

/* Where the checksum is, behind the IP header. */
static __always_inline __u32 xdp_check_at(__u8 proto)
{
	return proto == IPPROTO_TCP ? 16 : 6;
}

static __always_inline bool xdp_parse_v4(const void *ip, struct xdp_packet *packet)
{
	const __u8 *bytes = ip;
	const __be16 *halves = ip;
	const __be32 *words = ip;

	/* No options; fragments go to tc. */
	if (bytes[0] != 0x45 || halves[3] & bpf_htons(0x3fff))
		return false;
	packet->tos = bytes[1];
	packet->len = bpf_ntohs(halves[1]);
	packet->ttl = bytes[8];
	packet->proto = bytes[9];
	fib_addr_set_v4(&packet->src, words[3]);
	fib_addr_set_v4(&packet->dst, words[4]);
	return true;
}

static __always_inline bool xdp_parse_v6(const void *ip, struct xdp_packet *packet)
{
	const __u8 *bytes = ip;
	const __be16 *halves = ip;
	__u32 first = bpf_ntohl(*(const __be32 *)ip);

	if (first >> 28 != 6)
		return false;
	packet->tos = first >> 20;
	packet->len = bpf_ntohs(halves[2]) + XDP_V6_LEN;
	packet->ttl = bytes[7];
	packet->proto = bytes[6];
	fib_addr_set_v6(&packet->src, ip + 8);
	fib_addr_set_v6(&packet->dst, ip + 24);
	/* IPv4 in disguise would be taken for the IPv4 address in every map. */
	return !fib_addr_is_v4(&packet->src) && !fib_addr_is_v4(&packet->dst);
}

/* Whether the frame is one that XDP takes. */
static __always_inline bool xdp_parse(struct xdp_md *ctx, bool v4, struct xdp_packet *packet)
{
	void *ip = (void *)(long)ctx->data + ETH_HLEN, *end = (void *)(long)ctx->data_end;
	void *l4 = ip + xdp_ip_len(v4);

	if (l4 + XDP_UDP_LEN > end)
		return false;
	if (v4 ? !xdp_parse_v4(ip, packet) : !xdp_parse_v6(ip, packet))
		return false;
	if (packet->len > end - ip)
		return false;
	packet->sport = ((__be16 *)l4)[0];
	packet->dport = ((__be16 *)l4)[1];
	packet->tcp_flags = 0;
	if (likely(packet->proto == IPPROTO_TCP)) {
		if (l4 + XDP_TCP_LEN > end || packet->len < xdp_ip_len(v4) + XDP_TCP_LEN)
			return false;
		packet->tcp_flags = ((__u8 *)l4)[13];
		return true;
	}
	return packet->proto == IPPROTO_UDP && packet->len >= xdp_ip_len(v4) + XDP_UDP_LEN;
}

/* The sum of the addresses, not folded. */
static __always_inline __u64 xdp_sum_addresses(const struct xdp_packet *packet, bool v4)
{
	__u64 sum = (__u64)packet->src.w[3] + packet->dst.w[3];

	if (v4)
		return sum;
	return sum + packet->src.w[0] + packet->src.w[1] + packet->src.w[2] + packet->dst.w[0] + packet->dst.w[1] +
	       packet->dst.w[2];
}

/* Whether the checksum is still to be computed by a device: a packet from this very machine, by a veth, which
 * has the sum of the pseudo header in the field's place. Only the stack's own code, and tc, know that, and how to
 * keep it; one packet of 65,536 looks so by chance, and takes the way of tc. */
static __always_inline bool xdp_unsummed(struct xdp_md *ctx, bool v4, const struct xdp_packet *packet)
{
	void *l4 = (void *)(long)ctx->data + ETH_HLEN + xdp_ip_len(v4), *end = (void *)(long)ctx->data_end;
	__u64 sum = xdp_sum_addresses(packet, v4);
	__u16 check;

	if (packet->proto == IPPROTO_TCP) {
		if (l4 + XDP_TCP_LEN > end)
			return true;
		check = ((__u16 *)l4)[8];
	} else {
		if (l4 + XDP_UDP_LEN > end)
			return true;
		check = ((__u16 *)l4)[3];
	}
	sum += bpf_htons(packet->len - xdp_ip_len(v4)) + bpf_htons(packet->proto);
	return csum_fold(sum) == check;
}
