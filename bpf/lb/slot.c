/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Slot LB: what pods send, and what comes for them by whatever way. */
#pragma once

#include "lb/dsr.h"
#include "lb/forward.h"
#include "lb/reverse.h"

/* The client is a pod of this node: it keeps its address. */
static __always_inline int slot_from_pod(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct lb_config *config,
					 struct lb_way *way)
{
	struct fib_addr local = pkt->src;
	__u32 nat = 0;
	int action;

	if (fib_addr_same(&way->backend->addr, &pkt->src)) {
		forward_hairpin(&local, pkt->family);
		nat = LB_NAT_HAIRPIN;
	}
	if (!forward_record(skb, pkt, config, way, &local, nat, &action))
		return action;
	way_note(way, config);
	if (!forward_translate(skb, pkt, way, &local))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	return slot_after_lb(skb, pkt);
}

/* The client is a node or pod that speaks to this node: a pod elsewhere sees the node. */
static __always_inline int slot_from_overlay(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct lb_config *config,
					     struct lb_way *way)
{
	struct fib_addr local = pkt->src;
	bool here = endpoint_by_address(&way->backend->addr, pkt->family);
	int action;

	if (!here && !forward_node(config, pkt->family, &local))
		return verdict_drop(skb, pkt, REASON_LB_NO_ROUTE);
	if (!forward_record(skb, pkt, config, way, &local, here ? 0 : LB_NAT_SNAT, &action))
		return action;
	way_note(way, config);
	if (!forward_translate(skb, pkt, way, &local))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	if (here)
		return slot_after_lb(skb, pkt);
	pkt->src_identity = IDENTITY_REMOTE_NODE;
	pl_slots.call(skb, SLOT_REMOTE);
	return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
}

/* What POLICY_EGRESS leaves of an answer. */
int fib_lb_answer(struct __sk_buff *skb)
{
	struct lb_config *config = lb_configuration();
	struct pkt_ctx *pkt = slot_packet();
	struct lb_nat *nat;

	if (!pkt || !config)
		return TC_ACT_SHOT;
	nat = reverse_find(pkt);
	return nat ? reverse(skb, pkt, config, nat) : slot_forward(skb, pkt);
}

int fib_lb(struct __sk_buff *skb)
{
	struct lb_config *config = lb_configuration();
	struct pkt_ctx *pkt = slot_packet();
	struct lb_way way = {};
	enum way_kind kind;
	struct lb_nat *nat;
	__u32 to, from;

	if (!pkt)
		return TC_ACT_SHOT;
	to = lb_hint(&pkt->dst) & (LB_HINT_VIP | LB_HINT_RANGE | LB_HINT_NODE);
	from = lb_hint(&pkt->src) & LB_HINT_BACKEND;
	if (unlikely(pkt->flags & PKT_VLAN || !config))
		return slot_after_lb(skb, pkt);
	/* What it is about is not in its own header. */
	if (unlikely(forward_is_error(pkt)))
		forward_leave(skb, LB_TAIL_ICMP, false);
	/* Only nodes speak as such: their addresses have been checked. Pods may have tunnels of their own. */
	if (unlikely(dsr_is_tunnel(pkt)) && pkt->src_identity == IDENTITY_REMOTE_NODE && pkt->direction != DIR_TO_POD &&
	    endpoint_by_address(&pkt->dst, pkt->family))
		forward_leave(skb, LB_TAIL_DECAP, false);
	if (likely(!(to | from)))
		return slot_after_lb(skb, pkt);
	if (unlikely(!frag_ports(skb, pkt)))
		return to & LB_HINT_VIP ? verdict_drop(skb, pkt, REASON_LB_FRAGMENT) : slot_after_lb(skb, pkt);
	if (from) {
		nat = reverse_find(pkt);
		if (nat) {
			/* Policy is asked about what the pod sends, not about what the client sees. */
			if (pkt->direction == DIR_FROM_POD && !(nat->flags & LB_NAT_HAIRPIN)) {
				pkt->flags |= PKT_ANSWERS;
				pl_slots.call(skb, SLOT_POLICY_EGRESS);
			}
			return reverse(skb, pkt, config, nat);
		}
	}
	if (!to || (pkt->direction != DIR_FROM_POD && pkt->direction != DIR_FROM_OVERLAY))
		return slot_after_lb(skb, pkt);
	kind = way_find(&way, config, pkt, to, false);
	if (kind == WAY_OTHER)
		return slot_after_lb(skb, pkt);
	if (kind != WAY_SERVED || !way.backend)
		return forward_refuse(skb, pkt, &way, kind);
	if (pkt->direction == DIR_FROM_POD)
		return slot_from_pod(skb, pkt, config, &way);
	return slot_from_overlay(skb, pkt, config, &way);
}
