/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Tells a client what became of its packet: nobody serves it (TCP reset, ICMP port unreachable), or it is too big for
 * the way to its backend. The packet itself is made the answer, and goes back whence it came. */
#pragma once

#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include "abi/ipcache.h"
#include "lb/flow.h"
#include "lb/work.h"
#include "lib/csum.h"
#include "lib/slot.h"

#define REJECT_TTL 64
#define REJECT_RST 0x04
#define REJECT_ACK 0x10
#define REJECT_TCP_LEN 20
#define REJECT_ICMP_LEN 8

/* What a reset needs to know of the packet, whose place it takes. */
struct reject_reset {
	__be32 seq;
	__be32 ack;
	__u8 flags;
	bool unsummed; /* a device is still to compute the checksum: only the pseudo header's has to be there */
};

/* Sum of the pseudo header, which is the same in both directions but for the length. */
static __always_inline __u64 reject_pseudo(const struct pkt_ctx *pkt, __u32 len, __u8 proto)
{
	__u64 sum = (__u64)pkt->src.w[3] + pkt->dst.w[3] + bpf_htonl(len) + bpf_htonl(proto);

	if (pkt->family == 4)
		return sum;
	return sum + pkt->src.w[0] + pkt->src.w[1] + pkt->src.w[2] + pkt->dst.w[0] + pkt->dst.w[1] + pkt->dst.w[2];
}

static __always_inline __u32 reject_ip_len(const struct pkt_ctx *pkt)
{
	return pkt->family == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
}

/* The IP header of the answer, which has `len` bytes behind it. */
static __always_inline bool reject_ip(struct __sk_buff *skb, const struct pkt_ctx *pkt, __u32 len, __u8 proto)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 *words = data + ETH_HLEN;
	__u16 *macs = data, mac;

	if (data + ETH_HLEN + sizeof(struct ipv6hdr) > end)
		return false;
#pragma unroll
	for (int at = 0; at < 3; at++) {
		mac = macs[at];
		macs[at] = macs[at + 3];
		macs[at + 3] = mac;
	}
	if (pkt->family == 6) {
		words[0] = bpf_htonl(6u << 28);
		words[1] = bpf_htonl(len << 16 | (__u32)proto << 8 | REJECT_TTL);
		__builtin_memcpy(data + ETH_HLEN + 8, &pkt->dst, sizeof(pkt->dst));
		__builtin_memcpy(data + ETH_HLEN + 24, &pkt->src, sizeof(pkt->src));
		return true;
	}
	words[0] = bpf_htonl(0x45u << 24 | (len + sizeof(struct iphdr)));
	words[1] = bpf_htonl(0x4000); /* don't fragment */
	words[2] = bpf_htonl((__u32)REJECT_TTL << 24 | (__u32)proto << 16);
	words[3] = pkt->dst.w[3];
	words[4] = pkt->src.w[3];
	((__u16 *)words)[5] = ~csum_fold((__u64)words[0] + words[1] + words[2] + words[3] + words[4]);
	return true;
}

static __always_inline bool reject_look(struct __sk_buff *skb, const struct pkt_ctx *pkt, struct reject_reset *reset)
{
	struct tcphdr tcp;
	__u32 len = skb->len - pkt->l4_off;

	if (pkt->tcp_flags & REJECT_RST || bpf_skb_load_bytes(skb, pkt->l4_off, &tcp, sizeof(tcp)))
		return false;
	if (pkt->tcp_flags & REJECT_ACK) {
		reset->seq = tcp.ack_seq;
		reset->ack = 0;
		reset->flags = REJECT_RST;
	} else {
		reset->seq = 0;
		reset->ack = bpf_htonl(bpf_ntohl(tcp.seq) + len - pkt->l4_len + (pkt->tcp_flags & 1) + (pkt->tcp_flags >> 1 & 1));
		reset->flags = REJECT_RST | REJECT_ACK;
	}
	reset->unsummed = pkt->l4_off == ETH_HLEN + reject_ip_len(pkt) &&
			  csum_fold(reject_pseudo(pkt, len, IPPROTO_TCP)) == tcp.check;
	return true;
}

/* A TCP reset takes the packet's place. */
static __always_inline bool reject_tcp(struct __sk_buff *skb, const struct pkt_ctx *pkt)
{
	__u32 at = ETH_HLEN + reject_ip_len(pkt), len = at + REJECT_TCP_LEN;
	__u32 words[5] = {};
	struct reject_reset reset;
	__u64 sum;

	if (!reject_look(skb, pkt, &reset) || skb->len < len)
		return false;
	if (bpf_skb_change_tail(skb, len, 0) || bpf_skb_pull_data(skb, len))
		return false;
	words[0] = (__u32)pkt->sport << 16 | pkt->dport;
	words[1] = reset.seq;
	words[2] = reset.ack;
	words[3] = bpf_htonl(5u << 28 | (__u32)reset.flags << 16);
	sum = reject_pseudo(pkt, REJECT_TCP_LEN, IPPROTO_TCP);
	words[4] = reset.unsummed ? csum_fold(sum)
				  : (__u16)~csum_fold(sum + words[0] + words[1] + words[2] + words[3]);
	return reject_ip(skb, pkt, REJECT_TCP_LEN, IPPROTO_TCP) && !bpf_skb_store_bytes(skb, at, words, sizeof(words), 0);
}

/* An ICMP error that quotes the packet's beginning; `mtu` 0: nobody is at the port. */
static __always_inline bool reject_icmp(struct __sk_buff *skb, const struct pkt_ctx *pkt, struct lb_work *work, __u32 mtu)
{
	__u64 quote = skb->len - ETH_HLEN;
	__u32 at = ETH_HLEN + reject_ip_len(pkt);
	__u8 proto = pkt->family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6;
	__u32 words[2];
	__u64 sum;

	if (quote > LB_QUOTE)
		quote = LB_QUOTE;
	/* In a way that the verifier can follow. */
	FLOW_OPAQUE(quote);
	quote &= sizeof(work->quote) - 1;
	if (quote < sizeof(struct iphdr))
		return false;
	__builtin_memset(work->quote, 0, sizeof(work->quote));
	if (bpf_skb_load_bytes(skb, ETH_HLEN, work->quote, quote))
		return false;
	/* Also makes one packet of what a device would have cut into many. */
	if (bpf_skb_change_tail(skb, ETH_HLEN + quote, 0) ||
	    bpf_skb_adjust_room(skb, reject_ip_len(pkt) + REJECT_ICMP_LEN, BPF_ADJ_ROOM_MAC, 0) ||
	    bpf_skb_pull_data(skb, ETH_HLEN + sizeof(struct ipv6hdr)))
		return false;
	if (pkt->family == 4)
		words[0] = bpf_htonl(mtu ? 3u << 24 | 4 << 16 : 3u << 24 | 3 << 16);
	else
		words[0] = bpf_htonl(mtu ? 2u << 24 : 1u << 24 | 4 << 16);
	words[1] = bpf_htonl(mtu);
	sum = (__u64)words[0] + words[1] + (__u32)bpf_csum_diff(0, 0, (void *)work->quote, sizeof(work->quote), 0);
	if (pkt->family == 6)
		sum += reject_pseudo(pkt, REJECT_ICMP_LEN + quote, proto);
	words[0] |= (__u32)(__u16)~csum_fold(sum) << 16;
	return reject_ip(skb, pkt, REJECT_ICMP_LEN + quote, proto) && !bpf_skb_store_bytes(skb, at, words, sizeof(words), 0);
}

/* To whom the packet came from. */
static __always_inline int reject_send(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct fib_addr src = pkt->src;

	if (pkt->direction == DIR_FROM_POD)
		return bpf_redirect_peer(skb->ifindex, 0);
	if (pkt->direction == DIR_FROM_UPLINK)
		return bpf_redirect(skb->ifindex, 0);
	pkt->src = pkt->dst;
	pkt->dst = src;
	pkt->src_identity = IDENTITY_REMOTE_NODE;
	pl_slots.call(skb, SLOT_REMOTE);
	return TC_ACT_SHOT;
}

int fib_lb_reject(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();
	struct lb_work *work = lb_work();
	__u32 mtu;
	bool made;

	if (!pkt || !work)
		return TC_ACT_SHOT;
	mtu = work->mtu;
	verdict_drop(skb, pkt, mtu ? REASON_LB_TOO_BIG : REASON_LB_NO_BACKEND);
	/* Only the first of a packet's fragments is ever answered. */
	if (pkt->flags & PKT_FRAG_LATER)
		return TC_ACT_SHOT;
	if (pkt->proto == IPPROTO_TCP && !mtu)
		made = reject_tcp(skb, pkt);
	else
		made = reject_icmp(skb, pkt, work, mtu);
	return made ? reject_send(skb, pkt) : TC_ACT_SHOT;
}
