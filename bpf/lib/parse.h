/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* One parser for both IP versions: fills the packet context in a single pass.
 *
 * A cursor moves over what is linear of the packet; each parse_* step does its own bounds check and returns
 * a drop reason, or REASON_NONE with the cursor behind what it has read. Only Ethernet and the fixed IP
 * header are read through the cursor; what lies behind, where it is not linear, is fetched by a helper, so
 * a packet is almost never copied.
 */
#pragma once

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/tcp.h>
#include "abi/pipeline.h"
#include "lib/likely.h"

/* What must be linear to begin with: Ethernet and either IPv6 or IPv4 with TCP. The stack sends headers
 * linear; a packet shorter in its linear part but not in all comes from a packet socket. */
#define PARSE_LINEAR 54
#define PARSE_VLAN_TAGS 2
#define PARSE_EXT_HEADERS 6

#define IP_MORE_FRAGMENTS 0x2000
#define IP_FRAG_OFFSET 0x1fff

struct cursor {
	void *pos;
	void *end;
};

/* A cursor at the frame's start, with PARSE_LINEAR bytes linear if the packet has that many. Invalidates
 * packet pointers. */
static __always_inline struct cursor parse_begin(struct __sk_buff *skb)
{
	struct cursor at = { .pos = (void *)(long)skb->data, .end = (void *)(long)skb->data_end };

	if (likely(at.pos + PARSE_LINEAR <= at.end) || skb->len <= at.end - at.pos)
		return at;
	bpf_skb_pull_data(skb, skb->len < PARSE_LINEAR ? skb->len : PARSE_LINEAR);
	return (struct cursor){ .pos = (void *)(long)skb->data, .end = (void *)(long)skb->data_end };
}

/* Skips VLAN tags, setting PKT_VLAN; also for a tag that the driver has taken out of the packet. */
static __always_inline __u32 parse_eth(struct cursor *at, struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct ethhdr *eth = at->pos;
	__be16 type;

	if ((void *)(eth + 1) > at->end)
		return REASON_TRUNCATED;
	at->pos = eth + 1;
	/* By hand: the header's type says "packed", which makes the compiler load bytes. */
	type = ((const __be16 *)eth)[6];
	pkt->flags = skb->vlan_present ? PKT_VLAN : 0;
#pragma unroll
	for (int tag = 0; tag < PARSE_VLAN_TAGS; tag++) {
		__be16 *inner = at->pos;

		if (type != bpf_htons(ETH_P_8021Q) && type != bpf_htons(ETH_P_8021AD))
			break;
		if ((void *)(inner + 2) > at->end)
			return REASON_TRUNCATED;
		type = inner[1];
		at->pos = inner + 2;
		pkt->flags |= PKT_VLAN;
	}
	pkt->ethertype = type;
	return REASON_NONE;
}

/* `bytes` of the packet at `offset` to `to`, wherever they are. */
static __always_inline __u32 parse_fetch(struct __sk_buff *skb, __u32 offset, void *to, __u32 bytes)
{
	return bpf_skb_load_bytes(skb, offset, to, bytes) ? REASON_TRUNCATED : REASON_NONE;
}

/* The first bytes of a TCP header: what a context keeps of it. */
struct tcp_start {
	__be16 source, dest;
	__be32 seq, ack_seq;
	__u8 doff; /* upper four bits: words of header */
	__u8 flags;
};

static __always_inline __u32 parse_tcp(const struct tcp_start *tcp, struct pkt_ctx *pkt)
{
	pkt->sport = tcp->source;
	pkt->dport = tcp->dest;
	pkt->tcp_flags = tcp->flags;
	pkt->l4_len = (tcp->doff >> 4) * 4;
	return pkt->l4_len < sizeof(struct tcphdr) ? REASON_MALFORMED : REASON_NONE;
}

/* Ports, or ICMP type and code. Other protocols have neither. `offset` of the header is also where the
 * cursor stands, unless it has lost its way (null). */
static __always_inline __u32 parse_l4(struct cursor *at, struct __sk_buff *skb, struct pkt_ctx *pkt, __u32 offset)
{
	__u32 failure;

	pkt->l4_off = offset;
	if (pkt->flags & PKT_FRAG_LATER)
		return REASON_NONE;
	if (likely(pkt->proto == IPPROTO_TCP)) {
		struct tcp_start copy;

		if (at->pos && at->pos + sizeof(struct tcphdr) <= at->end)
			return parse_tcp(at->pos, pkt);
		failure = parse_fetch(skb, offset, &copy, 14);
		return failure ? failure : parse_tcp(&copy, pkt);
	}
	if (pkt->proto == IPPROTO_UDP || pkt->proto == IPPROTO_UDPLITE || pkt->proto == IPPROTO_SCTP) {
		__be16 ports[4];

		failure = parse_fetch(skb, offset, ports, sizeof(ports));
		if (failure)
			return failure;
		pkt->sport = ports[0];
		pkt->dport = ports[1];
		pkt->l4_len = pkt->proto == IPPROTO_SCTP ? 0 : sizeof(ports);
	} else if (pkt->proto == IPPROTO_ICMP || pkt->proto == IPPROTO_ICMPV6) {
		__u8 icmp[4];

		failure = parse_fetch(skb, offset, icmp, sizeof(icmp));
		if (failure)
			return failure;
		pkt->icmp_type = icmp[0];
		pkt->icmp_code = icmp[1];
	}
	return REASON_NONE;
}

static __always_inline __u32 parse_ipv4(struct cursor *at, struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct iphdr *ip = at->pos;
	__u32 offset = at->pos - (void *)(long)skb->data;
	__u32 header;

	if ((void *)(ip + 1) > at->end)
		return REASON_TRUNCATED;
	header = ip->ihl * 4;
	if (ip->version != 4 || header < sizeof(*ip))
		return REASON_MALFORMED;
	pkt->family = 4;
	fib_addr_set_v4(&pkt->src, ip->saddr);
	fib_addr_set_v4(&pkt->dst, ip->daddr);
	pkt->proto = ip->protocol;
	if (ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_FRAG_OFFSET))
		pkt->flags |= ip->frag_off & bpf_htons(IP_FRAG_OFFSET) ? PKT_FRAG_LATER : PKT_FRAG_FIRST;
	at->pos += header;
	return parse_l4(at, skb, pkt, offset + header);
}

/* Walks the extension headers; the one at the cursor is of type pkt->proto. */
static __always_inline __u32 parse_ext_headers(struct __sk_buff *skb, struct pkt_ctx *pkt, __u32 *offset)
{
	__u8 header[4]; /* next header; length, in units that depend; fragment: offset and flags */

	for (int count = 0; count <= PARSE_EXT_HEADERS; count++) {
		__u8 type = pkt->proto;

		if (type != IPPROTO_HOPOPTS && type != IPPROTO_ROUTING && type != IPPROTO_DSTOPTS &&
		    type != IPPROTO_FRAGMENT && type != IPPROTO_AH && type != IPPROTO_MH)
			return REASON_NONE;
		if (parse_fetch(skb, *offset, header, sizeof(header)))
			return REASON_TRUNCATED;
		pkt->proto = header[0];
		if (type == IPPROTO_FRAGMENT) {
			*offset += 8;
			if (header[2] || header[3] & 0xf8) {
				/* What follows is the middle of a packet: its protocol is that of the
				 * whole. */
				pkt->flags |= PKT_FRAG_LATER;
				return REASON_NONE;
			}
			if (header[3] & 1)
				pkt->flags |= PKT_FRAG_FIRST;
		} else if (type == IPPROTO_AH) {
			*offset += (header[1] + 2) * 4;
		} else {
			*offset += (header[1] + 1) * 8;
		}
	}
	return REASON_EXT_HEADERS;
}

static __always_inline bool parse_may_be_ext_header(__u8 type)
{
	return type != IPPROTO_TCP && type != IPPROTO_UDP && type != IPPROTO_ICMPV6;
}

static __always_inline __u32 parse_ipv6(struct cursor *at, struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct ipv6hdr *ip = at->pos;
	__u32 offset = at->pos - (void *)(long)skb->data + sizeof(*ip);

	if ((void *)(ip + 1) > at->end)
		return REASON_TRUNCATED;
	if (ip->version != 6)
		return REASON_MALFORMED;
	pkt->family = 6;
	fib_addr_set_v6(&pkt->src, &ip->saddr);
	fib_addr_set_v6(&pkt->dst, &ip->daddr);
	/* ::ffff:a.b.c.d would be taken for the IPv4 address in every map. */
	if (fib_addr_is_v4(&pkt->src) || fib_addr_is_v4(&pkt->dst))
		return REASON_MARTIAN;
	pkt->proto = ip->nexthdr;
	at->pos = ip + 1;
	if (parse_may_be_ext_header(ip->nexthdr)) {
		__u32 failure = parse_ext_headers(skb, pkt, &offset);

		if (failure)
			return failure;
		at->pos = 0;
	}
	return parse_l4(at, skb, pkt, offset);
}

/* Everything behind Ethernet. Other ethertypes leave family 0. */
static __always_inline __u32 parse_ip(struct cursor *at, struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	pkt->family = 0;
	pkt->proto = 0;
	pkt->sport = pkt->dport = 0;
	pkt->l4_off = 0;
	pkt->l4_len = pkt->tcp_flags = pkt->icmp_type = pkt->icmp_code = 0;
	if (likely(pkt->ethertype == bpf_htons(ETH_P_IP)))
		return parse_ipv4(at, skb, pkt);
	if (pkt->ethertype == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(at, skb, pkt);
	return REASON_NONE;
}
