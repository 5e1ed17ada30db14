/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Tells whoever sent a refused packet: TCP by a reset, all else by an ICMP error, "administratively prohibited". It comes from whom the
 * packet was sent to, with the service's address if that was one.
 *
 *   DIR_FROM_POD      back into the pod that sent it
 *   DIR_FROM_OVERLAY  by slot REMOTE, as the refusing pod
 *   DIR_FROM_UPLINK   out by the uplink, by the host's routes
 *   DIR_TO_POD        to the host's stack, as if the pod had sent it: fib_from_pod sees it, and policy, which knows it by its mark
 *   DIR_FROM_HOST     to the host's stack, as if it had come by the uplink, or out of the overlay
 */
#pragma once

#include "abi/endpoint.h"
#include "abi/ipcache.h"
#include "identity/redirect.h"
#include "identity/to_host.h"
#include "lb/translate.h"
#include "lib/answer.h"
#include "lib/router.h"
#include "lib/slot.h"
#include "policy/work.h"

/* Never an answer to an answer: that could go on forever. */
static __always_inline bool reject_answerable(const struct pkt_ctx *pkt)
{
	if (pkt->flags & PKT_FRAG_LATER)
		return false;
	if (pkt->proto == IPPROTO_ICMP)
		return pkt->icmp_type != 3 && pkt->icmp_type != 4 && pkt->icmp_type != 5 && pkt->icmp_type != 11 && pkt->icmp_type != 12;
	if (pkt->proto == IPPROTO_ICMPV6)
		return pkt->icmp_type >= 128 && pkt->icmp_type != 137; /* errors, redirect */
	return true;
}

/* Gives the packet back the addresses that it was sent with. Of a client's two connections that would be one at their backend, the
 * second one's port is not known here: its sender hears nothing. */
static __always_inline bool reject_untranslate(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct ends to = { .src = pkt->src, .dst = pkt->dst, .sport = pkt->sport, .dport = pkt->dport };

	if (!(pkt->flags & PKT_TRANSLATED))
		return true;
	if (pkt->flags & PKT_ANSWER) {
		to.src = pkt->orig_dst;
		to.sport = pkt->orig_dport;
	} else {
		to.dst = pkt->orig_dst;
		to.dport = pkt->orig_dport;
	}
	return translate(skb, pkt, &to);
}

static __always_inline int reject_to_node(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct fib_addr src = pkt->src;
	__u32 id = pkt->src_identity;

	/* Services have no identity but this node's, peers believe that of nobody else. */
	pkt->src_identity = pkt->dst_identity;
	if (pkt->dst_identity == IDENTITY_HOST || (pkt->flags & PKT_TRANSLATED && !(pkt->flags & PKT_ANSWER)))
		pkt->src_identity = IDENTITY_REMOTE_NODE;
	pkt->dst_identity = id;
	pkt->src = pkt->dst;
	pkt->dst = src;
	id = pkt->src_id;
	pkt->src_id = pkt->dst_id;
	pkt->dst_id = id;
	pkt->src_flags = 0;
	pl_slots.call(skb, SLOT_REMOTE);
	return TC_ACT_SHOT;
}

/* The answer, to whom the packet came from. */
static __always_inline int reject_send(struct __sk_buff *skb, struct pkt_ctx *pkt, __u32 host)
{
	struct endpoint *pod;

	if (pkt->direction == DIR_FROM_OVERLAY)
		return reject_to_node(skb, pkt);
	if (pkt->direction == DIR_FROM_UPLINK)
		return redirect_neigh(skb->ifindex, 0, 0, 0);
	if (pkt->direction == DIR_FROM_HOST && host == POL_HOST_OVERLAY)
		return overlay_to_host(skb, pkt);
	if (pkt->direction == DIR_FROM_HOST) {
		skb->mark = POL_MARK;
		return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
	}
	pod = endpoint_by_ifindex(skb->ifindex);
	if (!pod)
		return TC_ACT_SHOT;
	if (pkt->direction == DIR_FROM_POD) {
		router_address(skb, pod->pod_mac, pod->host_mac);
		return bpf_redirect_peer(skb->ifindex, 0);
	}
	router_address(skb, pod->host_mac, pod->pod_mac);
	skb->mark = POL_MARK;
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

int fib_policy_reject(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();
	struct pol_work *work = pol_work();
	__u32 type;
	bool made;

	if (!pkt || !work)
		return TC_ACT_SHOT;
	verdict_drop(skb, pkt, work->reason);
	if (!reject_answerable(pkt) || !reject_untranslate(skb, pkt))
		return TC_ACT_SHOT;
	type = pkt->family == 4 ? ANSWER_ICMP(3, 13) : ANSWER_ICMP(1, 1);
	if (pkt->proto == IPPROTO_TCP)
		made = answer_tcp(skb, pkt);
	else
		made = answer_icmp(skb, pkt, work->quote, type, 0);
	return made ? reject_send(skb, pkt, work->host) : TC_ACT_SHOT;
}
