/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Entry of packets leaving a pod: tc ingress of the host side of its veth pair.
 *
 * Parses, checks that the pod speaks for itself only, and starts the slots.
 */
#pragma once

#include "abi/endpoint.h"
#include "ipam/forward.c"
#include "lib/parse.h"
#include "lib/slot.h"

/* A frame whose destination is not the gateway's MAC: nothing of that kind is forwarded. */
static __always_inline __u32 from_pod_other_mac(const struct ethhdr *eth)
{
	const __u16 *dest = (const void *)eth->h_dest;

	if ((dest[0] & dest[1] & dest[2]) == 0xffff)
		return REASON_BROADCAST;
	return eth->h_dest[0] & 1 ? REASON_MULTICAST : REASON_WRONG_MAC;
}

/* The twelve address bytes of the frame against those the pod has to use. */
static __always_inline __u32 from_pod_check_macs(const struct ethhdr *eth, const struct endpoint *pod)
{
	const __u32 *seen = (const void *)eth, *due = (const void *)pod->host_mac;

	if (seen[0] == due[0] && seen[1] == due[1] && seen[2] == due[2])
		return REASON_NONE;
	for (int byte = 0; byte < ETH_ALEN; byte++)
		if (eth->h_source[byte] != pod->pod_mac[byte])
			return REASON_SPOOFED_MAC;
	return from_pod_other_mac(eth);
}

static __always_inline __u32 from_pod_check_source(const struct pkt_ctx *pkt, const struct endpoint *pod)
{
	if (pkt->family == 4)
		return pkt->src.w[3] == pod->v4 && pod->v4 ? REASON_NONE : REASON_SPOOFED_IPV4;
	return fib_addr_same(&pkt->src, &pod->v6) && pod->v6.q[0] ? REASON_NONE : REASON_SPOOFED_IPV6;
}

static __always_inline bool from_pod_is_neighbour(const struct pkt_ctx *pkt)
{
	return pkt->ethertype == bpf_htons(ETH_P_ARP) ||
	       (pkt->family == 6 && pkt->proto == IPPROTO_ICMPV6 && pkt->icmp_type >= 135 && pkt->icmp_type <= 136);
}

/* REASON_NONE: the packet may enter the slots. `*neighbour`: it is for SLOT_NEIGHBOUR instead. */
static __always_inline __u32 from_pod_check(struct __sk_buff *skb, struct pkt_ctx *pkt, bool *neighbour)
{
	struct endpoint *pod;
	struct cursor at;
	__u32 macs, reason;

	pod = endpoint_by_ifindex(skb->ifindex);
	if (!pod)
		return REASON_NO_ENDPOINT;
	pkt->src_id = pod->id;
	pkt->src_identity = pod->identity;
	pkt->src_flags = pod->flags;
	at = parse_begin(skb);
	reason = parse_eth(&at, skb, pkt);
	if (reason)
		return reason;
	macs = from_pod_check_macs((void *)(long)skb->data, pod);
	if (macs == REASON_SPOOFED_MAC)
		return macs;
	reason = parse_ip(&at, skb, pkt);
	if (pkt->flags & PKT_VLAN)
		return REASON_VLAN;
	if (reason)
		return reason;
	if (!pkt->family && pkt->ethertype != bpf_htons(ETH_P_ARP))
		return REASON_ETHERTYPE;
	if (from_pod_is_neighbour(pkt)) {
		*neighbour = true;
		return REASON_NONE;
	}
	return macs ? macs : from_pod_check_source(pkt, pod);
}

int fib_from_pod(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();
	bool neighbour = false;
	__u32 reason;

	if (!pkt)
		return TC_ACT_SHOT;
	pkt->direction = DIR_FROM_POD;
	pkt->src_id = pkt->dst_id = 0;
	pkt->dst_identity = 0;
	reason = from_pod_check(skb, pkt, &neighbour);
	if (reason)
		return verdict_drop(skb, pkt, reason);
	if (neighbour) {
		pl_slots.call(skb, SLOT_NEIGHBOUR);
		return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
	}
	pl_slots.call(skb, SLOT_LB);
	pl_slots.call(skb, SLOT_POLICY_EGRESS);
	return forward(skb, pkt);
}
