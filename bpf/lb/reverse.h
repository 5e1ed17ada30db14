/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Backends' answers, back to their clients. */
#pragma once

#include "lb/forward.h"
#include "lb/route.h"

/* The translation that a packet answers, or null. */
static __always_inline struct lb_nat *reverse_find(const struct pkt_ctx *pkt)
{
	struct lb_work *work = lb_work();

	if (!work)
		return 0;
	work->key.remote = pkt->src;
	work->key.local = pkt->dst;
	work->key.rport = pkt->sport;
	work->key.lport = pkt->dport;
	work->key.proto = pkt->proto;
	work->key.pad[0] = work->key.pad[1] = work->key.pad[2] = 0;
	return nat_find(&work->key);
}

/* What a backend says keeps the connection alive as well. */
static __always_inline void reverse_note(const struct lb_config *config, const struct pkt_ctx *pkt, struct lb_nat *nat)
{
	__u32 stamp = (nat->stamp & ~LB_STAMP) | flow_now(config);
	union flow_state state = {};
	struct lb_flow *flow;
	__u64 sig;

	if (pkt->proto == IPPROTO_TCP && pkt->tcp_flags & 0x05) /* FIN, RST */
		stamp |= LB_FLOW_CLOSING;
	if (likely(stamp == nat->stamp))
		return;
	*(volatile __u16 *)&nat->stamp = stamp;
	sig = lb_hash(config, &nat->client, nat->cport, &nat->vip, nat->vport, pkt->proto);
	flow = flow_find(config, sig, stamp & LB_STAMP, &state);
	if (flow && state.backend == nat->backend)
		flow_touch(flow, (state.stamp & ~LB_STAMP) | (stamp & (LB_STAMP | LB_FLOW_CLOSING)), state.stamp);
}

/* Rewrites an answer for the client. `nat` may be gone afterwards. */
static __always_inline bool reverse_translate(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct lb_nat *nat)
{
	struct ends to = { .src = nat->vip, .dst = nat->client, .sport = nat->vport, .dport = nat->cport };

	lb_count(LB_STAT_REVERSED);
	/* Policy knows the connection by its backend. */
	if (!(pkt->flags & PKT_TRANSLATED)) {
		pkt->orig_dst = pkt->src;
		pkt->orig_dport = pkt->sport;
		pkt->flags |= PKT_ANSWER | PKT_TRANSLATED;
	}
	return translate(skb, pkt, &to);
}

/* An answer to a client that came by the uplink leaves by the host's routes, past its stack: reverse path filters and
 * connection tracking there have never seen the client. */
static __always_inline int reverse_leave(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct lb_nat *nat)
{
	struct route route;
	enum route_result found;

	found = route_find(skb, pkt->family, &nat->vip, &nat->client, pkt->proto, route_len(skb, pkt), &route);
	if (unlikely(found == ROUTE_NONE))
		return verdict_drop(skb, pkt, REASON_LB_NO_ROUTE);
	if (unlikely(found == ROUTE_TOO_BIG))
		return forward_reject(skb, pkt, route.fib.mtu_result);
	if (unlikely(!router_hop(skb, pkt)))
		return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
	if (!reverse_translate(skb, pkt, nat))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	if (pkt->src_flags & EP_SHAPED_OUT)
		return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
	return route_leave(skb, pkt, &route);
}

/* An answer anywhere. */
static __always_inline int reverse(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct lb_config *config,
				   struct lb_nat *nat)
{
	__u32 flags = nat->flags;

	reverse_note(config, pkt, nat);
	if (flags & LB_NAT_OUTSIDE)
		return reverse_leave(skb, pkt, nat);
	if (!reverse_translate(skb, pkt, nat))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	/* Whom a client of another node spoke to is this node: peers believe that of nobody else. */
	if (pkt->direction == DIR_FROM_POD) {
		struct ipcache_entry *entry = ipcache_lookup(&pkt->src);

		if (entry && entry->node)
			pkt->src_identity = IDENTITY_REMOTE_NODE;
	}
	if (flags & LB_NAT_SNAT) {
		pkt->src_identity = IDENTITY_REMOTE_NODE;
		pl_slots.call(skb, SLOT_REMOTE);
		return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
	}
	/* A pod's policy has been asked before, unless it answers itself. */
	return pkt->flags & PKT_ANSWERS ? slot_forward(skb, pkt) : slot_after_lb(skb, pkt);
}
