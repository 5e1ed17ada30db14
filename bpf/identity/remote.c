/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Slot REMOTE: from a pod to what is no pod of this node.
 *
 * Whatever needs an ICMP error or a fragment, or is for no node of the cluster, goes to the host's stack. The
 * host has routes to every node's pods with the right MTU, and what takes them in overlay mode comes by
 * from_host.
 */
#pragma once

#include "abi/endpoint.h"
#include "abi/ipcache.h"
#include "abi/node.h"
#include "identity/overlay.h"
#include "identity/redirect.h"
#include "lib/router.h"
#include "lib/slot.h"

/* The stack may give the packet this node's address, and who receives overlay packets from that believes what they
 * say of this node's pods. */
static __always_inline bool remote_is_forged(const struct pkt_ctx *pkt)
{
	struct network_config *config;
	__u32 zero = 0;

	if (likely(pkt->proto != IPPROTO_UDP))
		return false;
	config = nd_config.lookup(&zero);
	return config && config->overlay_ifindex && pkt->dport == config->overlay_port;
}

static __always_inline int remote_to_stack(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	if (remote_is_forged(pkt))
		return verdict_drop(skb, pkt, REASON_OVERLAY_FORGED);
	return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
}

/* Over the uplink to the node itself as next hop; the kernel finds its MAC. */
static __always_inline int remote_route(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct node_entry *node)
{
	struct bpf_redir_neigh hop = {};

	if (pkt->family == 4 && !(node->flags & NODE_HOP_V6)) {
		if (!node->v4)
			return remote_to_stack(skb, pkt);
		hop.nh_family = 2; /* AF_INET */
		hop.ipv4_nh = node->v4;
	} else {
		if (!node->v6.q[0])
			return remote_to_stack(skb, pkt);
		hop.nh_family = 10; /* AF_INET6 */
		__builtin_memcpy(hop.ipv6_nh, node->v6.w, sizeof(hop.ipv6_nh));
	}
	if (!router_hop(skb, pkt))
		return remote_to_stack(skb, pkt);
	return verdict_pass(skb, pkt, VERDICT_TO_NODE, redirect_neigh(node->ifindex, &hop, sizeof(hop), 0));
}

int fib_remote(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();
	struct ipcache_entry *entry;
	struct node_entry *node;

	if (!pkt)
		return TC_ACT_SHOT;
	entry = ipcache_lookup(&pkt->dst);
	pkt->dst_identity = entry ? entry->identity : IDENTITY_WORLD;
	if (!entry || !entry->node)
		return remote_to_stack(skb, pkt);
	node = node_by_index(entry->node);
	if (!node || node->mode == NODE_NONE)
		return verdict_drop(skb, pkt, REASON_NODE_UNREACHABLE);
	if (node->mode == NODE_LOCAL || node->mode == NODE_STACK || pkt->src_flags & EP_SHAPED_OUT ||
	    router_too_big(skb, pkt, node->mtu))
		return remote_to_stack(skb, pkt);
	if (node->mode == NODE_ROUTED)
		return remote_route(skb, pkt, node);
	if (!router_hop(skb, pkt))
		return remote_to_stack(skb, pkt);
	return overlay_send(skb, pkt, node, pkt->src_identity);
}
