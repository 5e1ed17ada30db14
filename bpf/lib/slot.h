/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* How a program hands the packet to the next slot. Indices are constants, so the kernel turns each tail
 * call into a direct jump which it patches when the slot is filled or emptied: an empty slot costs about a
 * nanosecond. */
#pragma once

#include "abi/pipeline.h"
#include "lib/likely.h"
#include "lib/verdict.h"

/* Null only if the map were gone: then there is nothing to account to, and the caller drops. */
static __always_inline struct pkt_ctx *slot_packet(void)
{
	__u32 zero = 0;

	return pl_ctx.lookup(&zero);
}

/* From FORWARD (or a policy's redirect to a local pod) on: pkt->dst_* are set and the frame is ready for
 * the pod. */
static __always_inline int slot_deliver(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	pl_slots.call(skb, SLOT_DELIVER);
	return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
}

/* What POLICY_INGRESS ends with when it lets a packet pass, in both directions. */
static __always_inline int slot_after_policy_ingress(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	if (pkt->direction == DIR_TO_POD)
		return verdict_pass(skb, pkt, VERDICT_DELIVERED, TC_ACT_UNSPEC);
	return slot_deliver(skb, pkt);
}

/* To whom it is for. */
static __always_inline int slot_forward(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	pl_slots.call(skb, SLOT_FORWARD);
	return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
}

/* What POLICY_EGRESS ends with when it lets a packet pass. */
static __always_inline int slot_after_policy_egress(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	if (unlikely(pkt->flags & PKT_ANSWERS))
		pl_slots.call(skb, SLOT_LB_ANSWER);
	return slot_forward(skb, pkt);
}

/* What LB ends with: the packet goes on where it would have without. */
static __always_inline int slot_after_lb(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	if (pkt->direction == DIR_TO_POD) {
		pl_slots.call(skb, SLOT_POLICY_INGRESS);
		return verdict_pass(skb, pkt, VERDICT_DELIVERED, TC_ACT_UNSPEC);
	}
	if (pkt->direction == DIR_FROM_OVERLAY) {
		pl_slots.call(skb, SLOT_FROM_OVERLAY);
		return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
	}
	if (pkt->direction == DIR_FROM_POD)
		pl_slots.call(skb, SLOT_POLICY_EGRESS);
	return slot_forward(skb, pkt);
}
