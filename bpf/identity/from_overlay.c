/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Packets of other nodes out of the overlay: tc ingress of the VXLAN device.
 *
 * Nothing is believed that the ipcache does not confirm: a packet must come from the node its source address
 * belongs to, and carry the identity of that address. Where only the node's block of addresses is known yet (the pod is
 * newer than what this node has heard), that node may name any pod's identity: it is the one to know.
 */
#pragma once

#include "abi/endpoint.h"
#include "abi/ipcache.h"
#include "abi/node.h"
#include "identity/overlay.h"
#include "identity/to_host.h"
#include "lib/parse.h"
#include "lib/router.h"
#include "lib/slot.h"

#define NSEC_PER_SEC 1000000000ull

/* Whether the node may say so of an address it did not tell of yet. */
static __always_inline bool overlay_may_be_pods(__u32 identity)
{
	return identity == IDENTITY_INIT || (identity >= IDENTITY_CLUSTER_FIRST && identity < IDENTITY_LOCAL_FIRST);
}

/* Who sends; sets pkt->src_identity. */
static __always_inline __u32 overlay_check_sender(struct pkt_ctx *pkt, const struct overlay_sender *sender)
{
	struct ipcache_entry *entry = ipcache_lookup(&pkt->src);
	struct node_entry *node;

	if (!entry || !entry->node)
		return REASON_OVERLAY_SOURCE;
	node = node_by_index(entry->node);
	if (!node || node->mode != NODE_OVERLAY)
		return REASON_OVERLAY_SOURCE;
	if (fib_addr_is_v4(&sender->node) ? sender->node.w[3] != node->v4 : !fib_addr_same(&sender->node, &node->v6))
		return REASON_OVERLAY_SOURCE;
	if (!(entry->flags & IPC_SINGLE)) {
		pkt->src_identity = sender->identity;
		return overlay_may_be_pods(sender->identity) ? REASON_NONE : REASON_OVERLAY_IDENTITY;
	}
	pkt->src_identity = entry->identity;
	if (likely(sender->identity == entry->identity))
		return REASON_NONE;
	/* The address has just got this identity, and its node did not know when it sent this. */
	if (entry->before && sender->identity == entry->before &&
	    bpf_ktime_get_ns() < entry->before_until * NSEC_PER_SEC)
		return REASON_NONE;
	return REASON_OVERLAY_IDENTITY;
}

static __always_inline int overlay_to_here(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct ipcache_entry *entry = ipcache_lookup(&pkt->dst);
	struct node_entry *node;

	pkt->dst_identity = entry ? entry->identity : IDENTITY_WORLD;
	if (!entry || !entry->node)
		return verdict_drop(skb, pkt, REASON_OVERLAY_DESTINATION);
	node = node_by_index(entry->node);
	if (!node || node->mode != NODE_LOCAL)
		return verdict_drop(skb, pkt, REASON_OVERLAY_DESTINATION);
	pl_slots.call(skb, SLOT_POLICY_HOST);
	return overlay_to_host(skb, pkt);
}

static __always_inline __u32 overlay_parse(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct cursor at = parse_begin(skb);
	__u32 reason = parse_eth(&at, skb, pkt);

	if (!reason)
		reason = parse_ip(&at, skb, pkt);
	if (pkt->flags & PKT_VLAN)
		return REASON_VLAN;
	if (!reason && !pkt->family)
		return REASON_ETHERTYPE;
	return reason;
}

/* To whom it is for on this node. */
static __always_inline int overlay_in(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct endpoint *pod;

	pod = endpoint_by_address(&pkt->dst, pkt->family);
	if (!pod)
		return overlay_to_here(skb, pkt);
	if (!router_prepare(skb, pkt, pod))
		return overlay_to_host(skb, pkt);
	/* The frame came addressed to nobody here. Kernels before 6.15 remember that across a redirect into a pod, and
	 * drop it there. */
	bpf_skb_change_type(skb, PACKET_HOST);
	return router_enter(skb, pkt);
}

int fib_from_overlay(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();
	struct overlay_sender sender;
	__u32 reason;

	if (!pkt)
		return TC_ACT_SHOT;
	pkt->direction = DIR_FROM_OVERLAY;
	pkt->src_id = pkt->dst_id = pkt->src_flags = 0;
	pkt->src_identity = pkt->dst_identity = 0;
	pkt->flags = 0;
	reason = overlay_parse(skb, pkt);
	if (reason)
		return verdict_drop(skb, pkt, reason);
	if (!overlay_receive(skb, &sender))
		return verdict_drop(skb, pkt, REASON_OVERLAY_KEY);
	reason = overlay_check_sender(pkt, &sender);
	if (reason)
		return verdict_drop(skb, pkt, reason);
	pl_slots.call(skb, SLOT_LB);
	return overlay_in(skb, pkt);
}

int fib_overlay_in(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();

	return pkt ? overlay_in(skb, pkt) : TC_ACT_SHOT;
}
