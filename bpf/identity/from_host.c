/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* From the host's stack to pods of other nodes in the overlay: tc egress of fb<tag>host, to which the host's routes to
 * those pods lead. What else leaves by that interface is left alone.
 *
 * The host speaks as remote-node, which is what it is to the receiver. Packets of pods come by here, too, when they
 * needed the stack: they keep their pod's identity.
 */
#pragma once

#include "abi/endpoint.h"
#include "abi/ipcache.h"
#include "abi/node.h"
#include "identity/overlay.h"
#include "lib/parse.h"
#include "lib/slot.h"

int fib_from_host(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();
	struct ipcache_entry *entry;
	struct node_entry *node;
	struct endpoint *pod;
	struct cursor at;

	if (!pkt)
		return TC_ACT_UNSPEC;
	pkt->direction = DIR_FROM_HOST;
	pkt->src_id = pkt->dst_id = pkt->src_flags = 0;
	at = parse_begin(skb);
	if (parse_eth(&at, skb, pkt) || parse_ip(&at, skb, pkt) || !pkt->family || pkt->flags & PKT_VLAN)
		return TC_ACT_UNSPEC;
	entry = ipcache_lookup(&pkt->dst);
	if (!entry || !entry->node)
		return TC_ACT_UNSPEC;
	node = node_by_index(entry->node);
	if (!node || node->mode != NODE_OVERLAY)
		return TC_ACT_UNSPEC;
	pkt->dst_identity = entry->identity;
	pkt->src_identity = IDENTITY_REMOTE_NODE;
	pod = endpoint_by_address(&pkt->src, pkt->family);
	if (pod) {
		pkt->src_id = pod->id;
		pkt->src_identity = pod->identity;
	}
	if (!pod)
		pl_slots.call(skb, SLOT_POLICY_HOST);
	return overlay_send(skb, pkt, node, pkt->src_identity);
}
