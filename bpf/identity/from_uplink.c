/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Packets for pods of this node that come by the uplink as they are: tc ingress of the uplink.
 *
 * Everything else on the uplink is the host's and passes at once, uncounted. Packets of other nodes' pods go straight to
 * the pod. Those of the world go by the host's stack, whose firewall and connection tracking see both
 * directions of them.
 */
#pragma once

#include "abi/endpoint.h"
#include "abi/ipcache.h"
#include "abi/node.h"
#include "identity/sender.h"
#include "lib/parse.h"
#include "lib/router.h"
#include "lib/slot.h"
#include "lib/vlan.h"

/* The pod the packet is for, by the fixed headers alone; null for anything unusual. */
static __always_inline struct endpoint *uplink_pod(const struct cursor *at)
{
	struct ethhdr *eth = at->pos;
	struct fib_addr dst;

	if ((void *)(eth + 1) > at->end)
		return 0;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > at->end)
			return 0;
		fib_addr_set_v4(&dst, ip->daddr);
		return endpoint_by_address(&dst, 4);
	}
	if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > at->end)
			return 0;
		fib_addr_set_v6(&dst, &ip->daddr);
		return fib_addr_is_v4(&dst) ? 0 : endpoint_by_address(&dst, 6);
	}
	return 0;
}

int fib_from_uplink(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt;
	struct endpoint *pod;
	struct cursor at;
	bool direct = false;
	enum vlan vlan;
	__u32 reason;

	if (skb->pkt_type != PACKET_HOST)
		return TC_ACT_UNSPEC;
	vlan = vlan_of(skb);
	if (unlikely(vlan != VLAN_NONE))
		return vlan == VLAN_OTHER ? TC_ACT_UNSPEC : vlan_drop(skb);
	at = parse_begin(skb);
	pod = uplink_pod(&at);
	if (!pod)
		return TC_ACT_UNSPEC;
	pkt = slot_packet();
	if (!pkt)
		return TC_ACT_SHOT;
	pkt->direction = DIR_FROM_UPLINK;
	pkt->src_id = pkt->src_identity = pkt->src_flags = 0;
	pkt->dst_id = pod->id;
	pkt->dst_identity = pod->identity;
	reason = parse_eth(&at, skb, pkt);
	if (!reason)
		reason = parse_ip(&at, skb, pkt);
	if (!reason)
		reason = sender_check(pkt, &direct);
	if (reason)
		return verdict_drop(skb, pkt, reason);
	/* What the stack gets has LB at to_pod. */
	if (direct)
		pl_slots.call(skb, SLOT_LB);
	if (!direct || !router_prepare(skb, pkt, pod))
		return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
	return router_enter(skb, pkt);
}
