/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Tells a client what became of its packet: nobody serves it (TCP reset, ICMP port unreachable), or it is too big for
 * the way to its backend. The packet itself is made the answer, and goes back whence it came. */
#pragma once

#include "abi/ipcache.h"
#include "lb/work.h"
#include "lib/answer.h"
#include "lib/slot.h"

/* To whom the packet came from. */
static __always_inline int reject_send(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct fib_addr src = pkt->src;

	if (pkt->direction == DIR_FROM_POD)
		return bpf_redirect_peer(skb->ifindex, 0);
	if (pkt->direction == DIR_FROM_UPLINK)
		return bpf_redirect(skb->ifindex, 0);
	pkt->src = pkt->dst;
	pkt->dst = src;
	pkt->src_identity = IDENTITY_REMOTE_NODE;
	pl_slots.call(skb, SLOT_REMOTE);
	return TC_ACT_SHOT;
}

int fib_lb_reject(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();
	struct lb_work *work = lb_work();
	__u32 mtu, type;
	bool made;

	if (!pkt || !work)
		return TC_ACT_SHOT;
	mtu = work->mtu;
	type = pkt->family == 4 ? ANSWER_ICMP(3, mtu ? 4 : 3) : mtu ? ANSWER_ICMP(2, 0) : ANSWER_ICMP(1, 4);
	verdict_drop(skb, pkt, mtu ? REASON_LB_TOO_BIG : REASON_LB_NO_BACKEND);
	/* Only the first of a packet's fragments is ever answered. */
	if (pkt->flags & PKT_FRAG_LATER)
		return TC_ACT_SHOT;
	if (pkt->proto == IPPROTO_TCP && !mtu)
		made = answer_tcp(skb, pkt);
	else
		made = answer_icmp(skb, pkt, work->quote, type, mtu);
	return made ? reject_send(skb, pkt) : TC_ACT_SHOT;
}
