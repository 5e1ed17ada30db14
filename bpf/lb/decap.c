/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The backend's half of direct server return: what a balancer sends in IP, for a pod of this node or a process of this host.
 * Translated here, it is answered here, and straight to the client. */
#pragma once

#include "lb/dsr.h"
#include "lb/forward.h"
#include "lb/icmp.c"

#define DECAP_TRIES 4

/* Takes the outer header off and looks at what was inside. */
static __always_inline __u32 decap_open(struct __sk_buff *skb, struct pkt_ctx *pkt, __u32 room)
{
	__u32 reason;
	struct cursor at;

	if (bpf_skb_adjust_room(skb, -(int)room, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
		return REASON_MALFORMED;
	at = parse_begin(skb);
	reason = parse_eth(&at, skb, pkt);
	if (!reason)
		reason = parse_ip(&at, skb, pkt);
	if (reason)
		return reason;
	return pkt->family && !(pkt->flags & PKT_VLAN) ? REASON_NONE : REASON_MALFORMED;
}

/* Whether a client may have the address that it has. What came by the uplink may have been put into its tunnel by XDP, which does
 * not look at senders: nobody outside speaks for a pod that is reached by the overlay. */
static __always_inline bool decap_believed(struct pkt_ctx *pkt)
{
	struct ipcache_entry *entry = ipcache_lookup(&pkt->src);
	struct node_entry *node;

	pkt->src_identity = entry ? entry->identity : IDENTITY_WORLD;
	if (pkt->direction != DIR_FROM_UPLINK || !entry || !entry->node)
		return true;
	node = node_by_index(entry->node);
	if (!node || node->mode != NODE_OVERLAY)
		return true;
	return pkt->family == 4 ? pkt->src.w[3] == node->v4 : fib_addr_same(&pkt->src, &node->v6);
}

/* Ports by which a backend may know a client: its own first. Others are for who speaks from one port to several frontends of a
 * backend, which would take it for one connection; they are the frontend's, so that each packet finds the same again. */
static __always_inline __be16 decap_local(__be16 cport, const struct fib_addr *vip, __be16 vport, __u32 attempt)
{
	__u32 mixed = (vip->w[3] ^ (__u32)vport << 16 ^ cport) * 0x9e3779b1 + attempt * 0x85ebca6b;

	return attempt ? bpf_htons(1024 + ((mixed >> 16) * (65536 - 1024) >> 16)) : cport;
}

/* Records whom the backend will answer, and as whom it sees him: work->key.lport. */
static __always_inline enum nat_result decap_record(const struct lb_config *config, const struct pkt_ctx *pkt, struct lb_work *work,
						    __u32 flags)
{
	bool begins = pkt->proto == IPPROTO_TCP && (pkt->tcp_flags & 0x12) == 0x02; /* SYN without ACK */
	__u32 now = flow_now(config), tries = pkt->proto == IPPROTO_SCTP ? 1 : DECAP_TRIES;
	enum nat_result result = NAT_TAKEN;
	struct lb_nat *known = 0;

	work->key.local = pkt->src;
	work->key.proto = pkt->proto;
	work->nat.client = pkt->src;
	work->nat.vip = pkt->dst;
	work->nat.cport = pkt->sport;
	work->nat.vport = pkt->dport;
	work->nat.flags = flags;
	for (__u32 attempt = 0; attempt < DECAP_TRIES && attempt < tries; attempt++) {
		work->key.lport = decap_local(pkt->sport, &pkt->dst, pkt->dport, attempt);
		known = nat_find(&work->key);
		if (likely(known && nat_is_of(known, &work->nat)))
			break;
		/* Who begins where nobody is needs no other. */
		if (!known && begins)
			break;
		known = 0;
	}
	work->nat.stamp = flow_stamp(0, now, pkt->proto, pkt->tcp_flags);
	if (likely(known)) {
		if (!flow_begins(known->stamp, pkt->proto, pkt->tcp_flags))
			work->nat.stamp = flow_stamp(known->stamp, now, pkt->proto, pkt->tcp_flags);
		return likely(known->stamp == work->nat.stamp) ? NAT_OK : nat_write(config, &work->key, &work->nat);
	}
	for (__u32 attempt = 0; attempt < DECAP_TRIES && attempt < tries && result == NAT_TAKEN; attempt++) {
		work->key.lport = decap_local(pkt->sport, &pkt->dst, pkt->dport, attempt);
		result = nat_write(config, &work->key, &work->nat);
	}
	return result;
}

static __always_inline int decap_deliver(struct __sk_buff *skb, struct pkt_ctx *pkt, bool uplink)
{
	if (uplink)
		return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
	return slot_after_lb(skb, pkt);
}

/* An error about what the backend has answered. */
static __always_inline int decap_error(struct __sk_buff *skb, struct pkt_ctx *pkt, struct lb_work *work)
{
	struct icmp_quoted quoted = {};
	struct ends inside, outer;
	struct lb_nat *nat = 0;

	if (!icmp_read(skb, pkt, &quoted))
		return verdict_drop(skb, pkt, REASON_MALFORMED);
	work->key.local = quoted.ends.dst;
	work->key.proto = quoted.proto;
	for (__u32 attempt = 0; attempt < DECAP_TRIES && !nat; attempt++) {
		work->key.lport = decap_local(quoted.ends.dport, &quoted.ends.src, quoted.ends.sport, attempt);
		nat = nat_find(&work->key);
		if (nat && (nat->vport != quoted.ends.sport || !fib_addr_same(&nat->vip, &quoted.ends.src)))
			nat = 0;
	}
	if (!nat)
		return verdict_drop(skb, pkt, REASON_LB_NO_BACKEND);
	inside.src = work->key.remote;
	inside.dst = quoted.ends.dst;
	inside.sport = work->key.rport;
	inside.dport = work->key.lport;
	outer.src = pkt->src;
	outer.dst = work->key.remote;
	outer.sport = outer.dport = 0;
	if (!icmp_rewrite(skb, pkt, &quoted, &inside) || !translate(skb, pkt, &outer))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	return decap_deliver(skb, pkt, work->uplink);
}

int fib_lb_decap(struct __sk_buff *skb)
{
	struct lb_config *config = lb_configuration();
	struct pkt_ctx *pkt = slot_packet();
	struct lb_work *work = lb_work();
	enum nat_result result;
	struct ends to = {};
	__u32 reason, room;

	if (!pkt || !work || !config)
		return TC_ACT_SHOT;
	__builtin_memset(&work->key, 0, sizeof(work->key));
	__builtin_memset(&work->nat, 0, sizeof(work->nat));
	work->key.remote = pkt->dst;
	if (!dsr_port(skb, pkt, &work->key.rport, &room))
		return verdict_drop(skb, pkt, REASON_MALFORMED);
	reason = decap_open(skb, pkt, room);
	if (reason)
		return verdict_drop(skb, pkt, reason);
	if (unlikely(!decap_believed(pkt)))
		return verdict_drop(skb, pkt, REASON_UPLINK_SPOOFED);
	if (forward_is_error(pkt))
		return decap_error(skb, pkt, work);
	/* What is not the first fragment needs no ports. */
	work->key.lport = pkt->sport;
	if (frag_ports(skb, pkt)) {
		result = decap_record(config, pkt, work, work->uplink ? 0 : LB_NAT_OUTSIDE);
		if (unlikely(result != NAT_OK)) {
			lb_count(LB_STAT_NAT_FULL);
			return verdict_drop(skb, pkt, REASON_LB_NAT_FULL);
		}
	}
	to.src = pkt->src;
	to.dst = work->key.remote;
	to.sport = work->key.lport;
	to.dport = work->key.rport;
	if (!translate(skb, pkt, &to))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	return decap_deliver(skb, pkt, work->uplink);
}
