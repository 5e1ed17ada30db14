/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Whether a packet that came by the uplink as it is may have the source address that it has. */
#pragma once

#include "abi/ipcache.h"
#include "abi/node.h"
#include "abi/pipeline.h"

/* Who sends; sets pkt->src_identity. `*direct`: another node or its pod. */
static __always_inline __u32 sender_check(struct pkt_ctx *pkt, bool *direct)
{
	struct ipcache_entry *entry = ipcache_lookup(&pkt->src);
	struct node_entry *node;

	pkt->src_identity = entry ? entry->identity : IDENTITY_WORLD;
	if (!entry || !entry->node)
		return REASON_NONE;
	node = node_by_index(entry->node);
	if (!node || node->mode == NODE_LOCAL)
		return REASON_UPLINK_SPOOFED;
	/* A node's own address may come either way: anybody on its network could use it. */
	if (node->mode == NODE_OVERLAY &&
	    (pkt->family == 4 ? pkt->src.w[3] != node->v4 : !fib_addr_same(&pkt->src, &node->v6)))
		return REASON_UPLINK_SPOOFED;
	*direct = true;
	return REASON_NONE;
}
