/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Ports of fragments: the first one has them, and leaves them for those that follow. */
#pragma once

#include <uapi/linux/if_ether.h>
#include "abi/lb.h"
#include "abi/pipeline.h"
#include "lib/likely.h"

/* A fragment header is the last thing before what was cut, unless a sender is odd. */
static __always_inline __u32 frag_id_at(const struct pkt_ctx *pkt)
{
	return pkt->family == 4 ? ETH_HLEN + 4 : pkt->l4_off - 4;
}

/* Fills in the ports of a fragment. False: it came before its first one, or without. */
static __always_inline bool frag_ports(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct lb_frag_key key = {};
	struct lb_frag ports, *known;
	__u16 short_id;

	if (likely(!(pkt->flags & (PKT_FRAG_FIRST | PKT_FRAG_LATER))))
		return true;
	if (pkt->family == 4) {
		if (bpf_skb_load_bytes(skb, frag_id_at(pkt), &short_id, sizeof(short_id)))
			return false;
		key.id = short_id;
	} else if (bpf_skb_load_bytes(skb, frag_id_at(pkt), &key.id, sizeof(key.id))) {
		return false;
	}
	key.src = pkt->src;
	key.dst = pkt->dst;
	key.proto = pkt->proto;
	if (pkt->flags & PKT_FRAG_FIRST) {
		ports.sport = pkt->sport;
		ports.dport = pkt->dport;
		lb_frags.update(&key, &ports);
		return true;
	}
	known = lb_frags.lookup(&key);
	if (!known)
		return false;
	pkt->sport = known->sport;
	pkt->dport = known->dport;
	return true;
}
