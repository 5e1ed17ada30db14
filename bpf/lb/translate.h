/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Writes other addresses and ports into a packet, for tc: whatever has summed up the packet (nobody, hardware, or a device
 * that is still to do so) stays right. */
#pragma once

#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include "abi/pipeline.h"
#include "lib/csum.h"
#include "lib/likely.h"

/* Both ends of a packet. */
struct ends {
	struct fib_addr src;
	struct fib_addr dst;
	__be16 sport;
	__be16 dport;
};

static __always_inline __u32 translate_check_at(const struct pkt_ctx *pkt)
{
	if (pkt->flags & PKT_FRAG_LATER)
		return 0;
	return pkt->proto == IPPROTO_TCP ? 16 : pkt->proto == IPPROTO_UDP ? 6 : pkt->proto == IPPROTO_ICMPV6 ? 2 : 0;
}

/* The network header; `diff` is what the new addresses add to a sum. */
static __always_inline bool translate_addresses(struct __sk_buff *skb, const struct pkt_ctx *pkt, const struct ends *to, __u32 diff)
{
	void *data, *end;

	/* A sum that hardware made has the addresses as well, unless the IPv4 header's checksum makes up for them; for a transport
	 * header's checksum the kernel has taken off that one's change alone. */
	if (pkt->family == 6)
		bpf_csum_update(skb, diff);
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (pkt->family == 4) {
		struct iphdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > end)
			return false;
		ip->saddr = to->src.w[3];
		ip->daddr = to->dst.w[3];
		ip->check = csum_apply(ip->check, diff);
	} else {
		struct ipv6hdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > end)
			return false;
		__builtin_memcpy(&ip->saddr, &to->src, sizeof(to->src));
		__builtin_memcpy(&ip->daddr, &to->dst, sizeof(to->dst));
	}
	return true;
}

/* Addresses behind a checksum in the transport header, which has them in its pseudo header. */
static __always_inline bool translate_check(struct __sk_buff *skb, const struct pkt_ctx *pkt, __u32 at, __u32 diff)
{
	__u64 flags = BPF_F_PSEUDO_HDR | (pkt->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0);

	return !bpf_l4_csum_replace(skb, at, 0, diff, flags);
}

/* False: the packet must be dropped. SCTP's checksum knows no addresses, and knows ports, which therefore stay. */
static __always_inline bool translate(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct ends *to)
{
	__u32 diff = bpf_csum_diff((void *)&pkt->src, 32, (void *)&to->src, 32, 0);
	__u32 before = (__u32)pkt->dport << 16 | pkt->sport, ports = (__u32)to->dport << 16 | to->sport;
	bool fixed = pkt->flags & PKT_FRAG_LATER || pkt->proto == IPPROTO_SCTP;
	__u32 check = translate_check_at(pkt), at = pkt->l4_off + check;

	if (check && !translate_check(skb, pkt, at, diff))
		return false;
	if (before != ports && !fixed) {
		__u64 flags = sizeof(ports) | (pkt->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0);

		if (check && bpf_l4_csum_replace(skb, at, before, ports, flags))
			return false;
		if (bpf_skb_store_bytes(skb, pkt->l4_off, &ports, sizeof(ports), 0))
			return false;
	}
	if (!translate_addresses(skb, pkt, to, diff))
		return false;
	if (!(pkt->flags & PKT_TRANSLATED)) {
		pkt->orig_dst = pkt->dst;
		pkt->orig_dport = pkt->dport;
		pkt->flags |= PKT_TRANSLATED;
	}
	pkt->src = to->src;
	pkt->dst = to->dst;
	pkt->sport = to->sport;
	pkt->dport = to->dport;
	return true;
}
