/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Ports of fragments: the first one has them, and leaves them for those that follow. */
#pragma once

#include <uapi/linux/if_ether.h>
#include "abi/pipeline.h"
#include "abi/policy.h"
#include "policy/ct.h"

/* Fills in the ports of a fragment. False: it came before its first one, or without. */
static __always_inline bool frag_ports(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct pol_ports ports, *known;
	struct pol_frag key = {};
	__u16 short_id;

	if (likely(!(pkt->flags & (PKT_FRAG_FIRST | PKT_FRAG_LATER))))
		return true;
	if (pkt->family == 4) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN + 4, &short_id, sizeof(short_id)))
			return false;
		key.id = short_id;
	} else if (bpf_skb_load_bytes(skb, pkt->l4_off - 4, &key.id, sizeof(key.id))) {
		/* A fragment header is the last thing before what was cut, unless a sender is odd. */
		return false;
	}
	key.src = pkt->src;
	key.dst = pkt->dst;
	key.proto = pkt->proto;
	if (pkt->flags & PKT_FRAG_FIRST) {
		ports.sport = pkt->sport;
		ports.dport = pkt->dport;
		if (ct_is_icmp(pkt->proto)) {
			/* Id and sequence of an echo are ports in the wrong place; where there are none it does not matter. */
			if (bpf_skb_load_bytes(skb, pkt->l4_off + 4, &ports.sport, sizeof(ports.sport)))
				ports.sport = 0;
			ports.dport = (__u16)pkt->icmp_code << 8 | pkt->icmp_type;
		}
		pol_frags.update(&key, &ports);
		return true;
	}
	known = pol_frags.lookup(&key);
	if (!known)
		return false;
	pkt->sport = known->sport;
	pkt->dport = known->dport;
	if (ct_is_icmp(pkt->proto)) {
		pkt->icmp_type = known->dport & 0xff;
		pkt->icmp_code = known->dport >> 8;
		pkt->dport = 0;
	}
	return true;
}
