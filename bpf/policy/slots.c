/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Slots POLICY_EGRESS and POLICY_INGRESS for packets of connections that are known and allowed: one look at the connection answers for
 * both ends. All else is decide.c's. */
#pragma once

#include "abi/endpoint.h"
#include "abi/ipcache.h"
#include "lib/router.h"
#include "lib/slot.h"
#include "policy/work.h"

static __always_inline int slots_decide(struct __sk_buff *skb, struct pkt_ctx *pkt, __u32 end)
{
	struct pol_work *work = pol_work();

	if (work) {
		work->end = end;
		work->unrelated = 0;
		work->host = POL_HOST_NOT;
		work->through = 0;
		pol_tails.call(skb, POL_TAIL_DECIDE);
	}
	/* Security fails closed. */
	return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
}

/* Straight into a pod of this node whose policy allows the connection, too; else by FORWARD. */
static __always_inline int slots_forward(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct endpoint *pod,
					 const struct ct_entry *entry, bool forward)
{
	const struct pol_ep *ep;

	if (!pod || (pkt->src_flags & EP_SHAPED_OUT) | (pod->flags & EP_SHAPED_IN))
		return slot_after_policy_egress(skb, pkt);
	ep = ct_endpoint(pod->id, pod->ifindex);
	if (!ep || entry->revision[ct_policy(POL_INGRESS, forward)] != ep->revision || !router_prepare(skb, pkt, pod))
		return slot_after_policy_egress(skb, pkt);
	return router_deliver(skb, pkt);
}

int fib_policy_egress(struct __sk_buff *skb)
{
	struct pol_config *config = pol_configuration();
	struct pkt_ctx *pkt = slot_packet();
	const struct pol_ep *ep;
	struct endpoint *pod;
	struct ct_entry *entry;
	bool forward = false;

	if (!pkt || !config)
		return TC_ACT_SHOT;
	pod = endpoint_by_address(&pkt->dst, pkt->family);
	pkt->dst_id = pod ? pod->id : 0;
	pkt->dst_identity = pod ? pod->identity : ipcache_identity(&pkt->dst);
	ep = ct_endpoint(pkt->src_id, skb->ifindex);
	entry = ct_hit(config, pkt, &forward);
	if (likely(ep && entry && entry->revision[ct_policy(POL_EGRESS, forward)] == ep->revision) &&
	    (likely(pkt->dst_identity != IDENTITY_HOST) || ct_host_allows(entry, POL_INGRESS, forward)))
		return slots_forward(skb, pkt, pod, entry, forward);
	return slots_decide(skb, pkt, POL_EGRESS);
}

int fib_policy_ingress(struct __sk_buff *skb)
{
	struct pol_config *config = pol_configuration();
	struct pkt_ctx *pkt = slot_packet();
	const struct pol_ep *ep;
	struct ct_entry *entry;
	bool forward = false;

	if (!pkt || !config)
		return TC_ACT_SHOT;
	ep = ct_endpoint(pkt->dst_id, pkt->dst_ifindex);
	entry = ct_hit(config, pkt, &forward);
	if (unlikely(!ep || !entry || entry->revision[ct_policy(POL_INGRESS, forward)] != ep->revision))
		return slots_decide(skb, pkt, POL_INGRESS);
	if (unlikely(pkt->src_identity == IDENTITY_HOST && !ct_host_allows(entry, POL_EGRESS, forward)))
		return slots_decide(skb, pkt, POL_INGRESS);
	if (pkt->direction == DIR_TO_POD)
		return verdict_pass(skb, pkt, VERDICT_DELIVERED, TC_ACT_UNSPEC);
	return router_deliver(skb, pkt);
}
