/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The node as a router between its pods: slots FORWARD and DELIVER.
 *
 * Both are inline functions. A slot program of another service reaches them by tail call, as fib_forward
 * and fib_deliver; from_pod, when the slots before them are empty, just runs on into them. So a packet that
 * no other service handles takes no tail call at all (each would cost 4 to 5 ns), and filling a slot is
 * still one atomic map update.
 *
 * FORWARD decides by the destination address. A pod of this node: rewrite the frame and go on. Anything
 * else is SLOT_REMOTE's; while that is empty, and for everything that needs an ICMP error or a fragment, the
 * packet goes to the host's stack, which is good at those. Packets from there to a pod pass to_pod, so
 * nothing gets around policy.
 */
#pragma once

#include "abi/endpoint.h"
#include "lib/router.h"
#include "lib/slot.h"

static __always_inline int forward(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct endpoint *pod = endpoint_by_address(&pkt->dst, pkt->family);
	__u32 reason;

	if (!pod) {
		reason = router_check_destination(pkt);
		if (reason)
			return verdict_drop(skb, pkt, reason);
		pl_slots.call(skb, SLOT_REMOTE);
		return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
	}
	if (pkt->src_flags & EP_SHAPED_OUT || !router_prepare(skb, pkt, pod)) {
		pkt->dst_id = pod->id;
		return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
	}
	return router_enter(skb, pkt);
}

int fib_forward(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();

	return pkt ? forward(skb, pkt) : TC_ACT_SHOT;
}

int fib_deliver(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();

	return pkt ? router_deliver(skb, pkt) : TC_ACT_SHOT;
}
