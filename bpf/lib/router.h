/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What makes a node a router: which destinations it forwards to, hop counts, sizes, and the way into a pod of
 * its own. */
#pragma once

#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include "abi/endpoint.h"
#include "lib/parse.h"
#include "lib/slot.h"
#include "lib/ttl.h"

/* skb->pkt_type */
#define PACKET_HOST 0

/* skb->gso_size of a packet whose segments have each a length of their own (SCTP). */
#define GSO_BY_FRAGS 0xffff

/* Whether what arrives would be longer than `mtu`. A super-packet is judged by its segments. */
static __always_inline bool router_too_big(struct __sk_buff *skb, const struct pkt_ctx *pkt, __u32 mtu)
{
	if (skb->len <= mtu + ETH_HLEN)
		return false;
	if (!skb->gso_size || skb->gso_size == GSO_BY_FRAGS)
		return true;
	return skb->gso_size + pkt->l4_off - ETH_HLEN + pkt->l4_len > mtu;
}

/* Destinations which the host's stack would take, but a router must not. */
static __always_inline __u32 router_check_destination(const struct pkt_ctx *pkt)
{
	__u32 first;

	if (pkt->family == 4) {
		first = bpf_ntohl(pkt->dst.w[3]) >> 24;
		if (pkt->dst.w[3] == 0xffffffff)
			return REASON_BROADCAST;
		if (first == 0 || first == 127 || first >= 240)
			return REASON_MARTIAN;
		return first >= 224 ? REASON_MULTICAST : REASON_NONE;
	}
	first = bpf_ntohl(pkt->dst.w[0]);
	if (first >> 24 == 0xff)
		return REASON_MULTICAST;
	if (first >> 22 == 0xfe80 >> 6)
		return REASON_LINK_LOCAL;
	/* ::, ::1 and IPv4 in disguise. */
	return pkt->dst.q[0] ? REASON_NONE : REASON_MARTIAN;
}

/* One hop less. False: the hop count is used up, nothing is changed. */
static __always_inline bool router_hop(struct __sk_buff *skb, const struct pkt_ctx *pkt)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (pkt->family == 4) {
		struct iphdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > end || ip->ttl <= 1)
			return false;
		ttl_decrement_v4(ip);
	} else {
		struct ipv6hdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > end || ip->hop_limit <= 1)
			return false;
		/* Only what came by a wire can have a checksum that hardware summed up over all of it. */
		if (pkt->direction == DIR_FROM_POD)
			ttl_decrement_v6(ip);
		else
			ttl_decrement_v6_summed(skb, ip);
	}
	return true;
}

/* Addresses the frame: twelve bytes, receiver first. The caller has checked that they are there (router_hop). */
static __always_inline void router_address(struct __sk_buff *skb, const __u8 *to, const __u8 *from)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	const __u16 *receiver = (const void *)to, *sender = (const void *)from;
	__u16 *eth = data;

	if (data + ETH_HLEN > end)
		return;
	eth[0] = receiver[0];
	eth[1] = receiver[1];
	eth[2] = receiver[2];
	eth[3] = sender[0];
	eth[4] = sender[1];
	eth[5] = sender[2];
}

/* Sends the frame, addressed to the pod already, to the pod pkt->dst_ifindex. */
static __always_inline int router_deliver(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	int action;

	if (pkt->dst_flags & EP_SHAPED_IN)
		action = bpf_redirect(pkt->dst_ifindex, 0);
	else
		action = bpf_redirect_peer(pkt->dst_ifindex, 0);
	return verdict_pass(skb, pkt, VERDICT_DELIVERED, action);
}

/* Whether the packet can go to this pod past the host's stack; then it is ready for router_enter. If not,
 * nothing is changed but pkt->dst_*. */
static __always_inline bool router_prepare(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct endpoint *pod)
{
	pkt->dst_id = pod->id;
	pkt->dst_identity = pod->identity;
	pkt->dst_flags = pod->flags;
	pkt->dst_ifindex = pod->ifindex;
	if (router_too_big(skb, pkt, pod->mtu) || !router_hop(skb, pkt))
		return false;
	router_address(skb, pod->pod_mac, pod->host_mac);
	return true;
}

/* Past policy and into the pod. */
static __always_inline int router_enter(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	/* A shaped pod is reached through its host side's egress: to_pod runs there, and with it the
	 * policy, once. */
	if (!(pkt->dst_flags & EP_SHAPED_IN))
		pl_slots.call(skb, SLOT_POLICY_INGRESS);
	return router_deliver(skb, pkt);
}
