/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Entry of packets which the host's stack sends to a pod: tc egress of the host side of its veth pair.
 *
 * Pod to pod traffic does not come by here, unless it needed the stack or the pod is shaped.
 */
#pragma once

#include "abi/endpoint.h"
#include "abi/ipcache.h"
#include "lib/parse.h"
#include "lib/slot.h"

/* Who sends: a pod of this node (through the stack, because one of the two is shaped or the packet was an
 * exception), the host, somebody of another node, the world. */
static __always_inline void to_pod_source(struct pkt_ctx *pkt)
{
	struct endpoint *pod = endpoint_by_address(&pkt->src, pkt->family);

	if (pod) {
		pkt->src_id = pod->id;
		pkt->src_identity = pod->identity;
		return;
	}
	pkt->src_identity = ipcache_identity(&pkt->src);
}

int fib_to_pod(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();
	__u32 reason;
	struct endpoint *pod;
	struct cursor at;

	if (!pkt)
		return TC_ACT_SHOT;
	pkt->direction = DIR_TO_POD;
	pkt->src_id = pkt->src_identity = pkt->src_flags = 0;
	pkt->dst_id = 0;
	at = parse_begin(skb);
	reason = parse_eth(&at, skb, pkt);
	if (!reason)
		reason = parse_ip(&at, skb, pkt);
	if (reason)
		return verdict_drop(skb, pkt, reason);
	pod = endpoint_by_ifindex(skb->ifindex);
	if (!pod)
		return verdict_drop(skb, pkt, REASON_NO_ENDPOINT);
	pkt->dst_id = pod->id;
	pkt->dst_identity = pod->identity;
	pkt->dst_flags = pod->flags;
	pkt->dst_ifindex = pod->ifindex;
	/* The host's own ARP is nobody's policy. */
	if (pkt->family) {
		to_pod_source(pkt);
		pl_slots.call(skb, SLOT_LB);
		pl_slots.call(skb, SLOT_POLICY_INGRESS);
	}
	return verdict_pass(skb, pkt, VERDICT_DELIVERED, TC_ACT_UNSPEC);
}
