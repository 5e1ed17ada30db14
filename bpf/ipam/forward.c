/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The node as a router between its pods: slots FORWARD and DELIVER.
 *
 * Both are inline functions. A slot program of another service reaches them by tail call, as fib_forward
 * and fib_deliver; from_pod, when the slots before them are empty, just runs on into them. So a packet that
 * no other service handles takes no tail call at all (each would cost 4 to 5 ns), and filling a slot is
 * still one atomic map update.
 *
 * FORWARD decides by the destination address. A pod of this node: rewrite the frame and go on. Anything
 * else, and everything that needs an ICMP error or a fragment, goes to the host's stack, which is good at
 * those; packets from there to a pod pass to_pod, so nothing gets around policy.
 */
#pragma once

#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include "abi/endpoint.h"
#include "lib/parse.h"
#include "lib/slot.h"
#include "lib/ttl.h"

/* skb->gso_size of a packet whose segments have each a length of their own (SCTP). */
#define GSO_BY_FRAGS 0xffff

/* Whether what the pod would receive is longer than its MTU. A super-packet is judged by its segments. */
static __always_inline bool forward_too_big(struct __sk_buff *skb, const struct pkt_ctx *pkt, __u32 mtu)
{
	if (skb->len <= mtu + ETH_HLEN)
		return false;
	if (!skb->gso_size || skb->gso_size == GSO_BY_FRAGS)
		return true;
	return skb->gso_size + pkt->l4_off - ETH_HLEN + pkt->l4_len > mtu;
}

/* Destinations which the host's stack would take, but a router must not. */
static __always_inline __u32 forward_check_destination(const struct pkt_ctx *pkt)
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

static __always_inline int forward_to_stack(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	__u32 reason = forward_check_destination(pkt);

	if (reason)
		return verdict_drop(skb, pkt, reason);
	return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
}

/* One hop less and the pod's addresses on the frame. False: the hop count is used up, nothing is changed. */
static __always_inline bool forward_rewrite(struct __sk_buff *skb, const struct pkt_ctx *pkt,
					    const struct endpoint *pod)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	const __u16 *pod_mac = (const void *)pod->pod_mac, *host_mac = (const void *)pod->host_mac;
	__u16 *eth = data;

	if (pkt->family == 4) {
		struct iphdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > end || ip->ttl <= 1)
			return false;
		ttl_decrement_v4(ip);
	} else {
		struct ipv6hdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > end || ip->hop_limit <= 1)
			return false;
		ttl_decrement_v6(ip);
	}
	eth[0] = pod_mac[0];
	eth[1] = pod_mac[1];
	eth[2] = pod_mac[2];
	eth[3] = host_mac[0];
	eth[4] = host_mac[1];
	eth[5] = host_mac[2];
	return true;
}

/* Sends the frame, addressed to the pod already, to the pod pkt->dst_ifindex. */
static __always_inline int deliver(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	int action;

	if (pkt->dst_flags & EP_SHAPED_IN)
		action = bpf_redirect(pkt->dst_ifindex, 0);
	else
		action = bpf_redirect_peer(pkt->dst_ifindex, 0);
	return verdict_pass(skb, pkt, VERDICT_DELIVERED, action);
}

static __always_inline int forward(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct endpoint *pod = endpoint_by_address(&pkt->dst, pkt->family);

	if (!pod)
		return forward_to_stack(skb, pkt);
	pkt->dst_id = pod->id;
	pkt->dst_identity = pod->identity;
	pkt->dst_flags = pod->flags;
	pkt->dst_ifindex = pod->ifindex;
	if (pkt->src_flags & EP_SHAPED_OUT || forward_too_big(skb, pkt, pod->mtu) || !forward_rewrite(skb, pkt, pod))
		return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
	/* A shaped pod is reached through its host side's egress: to_pod runs there, and with it the
	 * policy, once. */
	if (!(pkt->dst_flags & EP_SHAPED_IN))
		pl_slots.call(skb, SLOT_POLICY_INGRESS);
	return deliver(skb, pkt);
}

int fib_forward(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();

	return pkt ? forward(skb, pkt) : TC_ACT_SHOT;
}

int fib_deliver(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();

	return pkt ? deliver(skb, pkt) : TC_ACT_SHOT;
}
