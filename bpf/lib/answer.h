/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Answers to whoever sent a packet: a TCP reset, or an ICMP error that quotes it. The packet itself is made the answer, between the
 * same addresses in the other direction, Ethernet's included; its context stays as it was. */
#pragma once

#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/tcp.h>
#include "abi/pipeline.h"
#include "lib/csum.h"

#define ANSWER_TTL 64
#define ANSWER_RST 0x04
#define ANSWER_ACK 0x10
#define ANSWER_TCP_LEN 20
#define ANSWER_ICMP_LEN 8
#define ANSWER_QUOTE 120 /* bytes of a packet that an error quotes */
#define ANSWER_QUOTE_WORDS 32
#define ANSWER_ICMP(type, code) ((__u32)(type) << 24 | (__u32)(code) << 16)

/* What a reset needs to know of the packet, whose place it takes. */
struct answer_reset {
	__be32 seq;
	__be32 ack;
	__u8 flags;
	bool unsummed; /* a device is still to compute the checksum: only the pseudo header's has to be there */
};

/* Sum of the pseudo header, which is the same in both directions but for the length. */
static __always_inline __u64 answer_pseudo(const struct pkt_ctx *pkt, __u32 len, __u8 proto)
{
	__u64 sum = (__u64)pkt->src.w[3] + pkt->dst.w[3] + bpf_htonl(len) + bpf_htonl(proto);

	if (pkt->family == 4)
		return sum;
	return sum + pkt->src.w[0] + pkt->src.w[1] + pkt->src.w[2] + pkt->dst.w[0] + pkt->dst.w[1] + pkt->dst.w[2];
}

static __always_inline __u32 answer_ip_len(const struct pkt_ctx *pkt)
{
	return pkt->family == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
}

/* The IP header of the answer, which has `len` bytes behind it. */
static __always_inline bool answer_ip(struct __sk_buff *skb, const struct pkt_ctx *pkt, __u32 len, __u8 proto)
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
		words[1] = bpf_htonl(len << 16 | (__u32)proto << 8 | ANSWER_TTL);
		__builtin_memcpy(data + ETH_HLEN + 8, &pkt->dst, sizeof(pkt->dst));
		__builtin_memcpy(data + ETH_HLEN + 24, &pkt->src, sizeof(pkt->src));
		return true;
	}
	words[0] = bpf_htonl(0x45u << 24 | (len + sizeof(struct iphdr)));
	words[1] = bpf_htonl(0x4000); /* don't fragment */
	words[2] = bpf_htonl((__u32)ANSWER_TTL << 24 | (__u32)proto << 16);
	words[3] = pkt->dst.w[3];
	words[4] = pkt->src.w[3];
	((__u16 *)words)[5] = ~csum_fold((__u64)words[0] + words[1] + words[2] + words[3] + words[4]);
	return true;
}

static __always_inline bool answer_look(struct __sk_buff *skb, const struct pkt_ctx *pkt, struct answer_reset *reset)
{
	struct tcphdr tcp;
	__u32 len = skb->len - pkt->l4_off;

	if (pkt->tcp_flags & ANSWER_RST || bpf_skb_load_bytes(skb, pkt->l4_off, &tcp, sizeof(tcp)))
		return false;
	if (pkt->tcp_flags & ANSWER_ACK) {
		reset->seq = tcp.ack_seq;
		reset->ack = 0;
		reset->flags = ANSWER_RST;
	} else {
		reset->seq = 0;
		reset->ack = bpf_htonl(bpf_ntohl(tcp.seq) + len - pkt->l4_len + (pkt->tcp_flags & 1) + (pkt->tcp_flags >> 1 & 1));
		reset->flags = ANSWER_RST | ANSWER_ACK;
	}
	reset->unsummed = pkt->l4_off == ETH_HLEN + answer_ip_len(pkt) &&
			  csum_fold(answer_pseudo(pkt, len, IPPROTO_TCP)) == tcp.check;
	return true;
}

/* A TCP reset takes the packet's place. */
static __always_inline bool answer_tcp(struct __sk_buff *skb, const struct pkt_ctx *pkt)
{
	__u32 at = ETH_HLEN + answer_ip_len(pkt), len = at + ANSWER_TCP_LEN;
	__u32 words[5] = {};
	struct answer_reset reset;
	__u64 sum;

	if (!answer_look(skb, pkt, &reset) || skb->len < len)
		return false;
	if (bpf_skb_change_tail(skb, len, 0) || bpf_skb_pull_data(skb, len))
		return false;
	words[0] = (__u32)pkt->sport << 16 | pkt->dport;
	words[1] = reset.seq;
	words[2] = reset.ack;
	words[3] = bpf_htonl(5u << 28 | (__u32)reset.flags << 16);
	sum = answer_pseudo(pkt, ANSWER_TCP_LEN, IPPROTO_TCP);
	words[4] = reset.unsummed ? csum_fold(sum)
				  : (__u16)~csum_fold(sum + words[0] + words[1] + words[2] + words[3]);
	return answer_ip(skb, pkt, ANSWER_TCP_LEN, IPPROTO_TCP) && !bpf_skb_store_bytes(skb, at, words, sizeof(words), 0);
}

/* An ICMP error of this type and code (ANSWER_ICMP) that quotes the packet's beginning; `mtu` 0: it tells none. */
static __always_inline bool answer_icmp(struct __sk_buff *skb, const struct pkt_ctx *pkt, __u32 quoted[ANSWER_QUOTE_WORDS], __u32 type,
					__u32 mtu)
{
	__u64 quote = skb->len - ETH_HLEN;
	__u32 at = ETH_HLEN + answer_ip_len(pkt);
	__u8 proto = pkt->family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6;
	__u32 words[2];
	__u64 sum;

	if (quote > ANSWER_QUOTE)
		quote = ANSWER_QUOTE;
	/* In a way that the verifier can follow. */
	asm volatile("" : "+r"(quote));
	quote &= ANSWER_QUOTE_WORDS * sizeof(__u32) - 1;
	if (quote < sizeof(struct iphdr))
		return false;
	__builtin_memset(quoted, 0, ANSWER_QUOTE_WORDS * sizeof(__u32));
	if (bpf_skb_load_bytes(skb, ETH_HLEN, quoted, quote))
		return false;
	/* Also makes one packet of what a device would have cut into many. */
	if (bpf_skb_change_tail(skb, ETH_HLEN + quote, 0) ||
	    bpf_skb_adjust_room(skb, answer_ip_len(pkt) + ANSWER_ICMP_LEN, BPF_ADJ_ROOM_MAC, 0) ||
	    bpf_skb_pull_data(skb, ETH_HLEN + sizeof(struct ipv6hdr)))
		return false;
	words[0] = bpf_htonl(type);
	words[1] = bpf_htonl(mtu);
	sum = (__u64)words[0] + words[1] + (__u32)bpf_csum_diff(0, 0, (void *)quoted, ANSWER_QUOTE_WORDS * sizeof(__u32), 0);
	if (pkt->family == 6)
		sum += answer_pseudo(pkt, ANSWER_ICMP_LEN + quote, proto);
	words[0] |= (__u32)(__u16)~csum_fold(sum) << 16;
	return answer_ip(skb, pkt, ANSWER_ICMP_LEN + quote, proto) && !bpf_skb_store_bytes(skb, at, words, sizeof(words), 0);
}
