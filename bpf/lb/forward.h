/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Clients' packets, on to backends. */
#pragma once

#include "abi/endpoint.h"
#include "abi/ipcache.h"
#include "abi/node.h"
#include "lb/frag.h"
#include "lb/nat.h"
#include "lb/translate.h"
#include "lb/way.h"
#include "lb/work.h"
#include "lib/router.h"
#include "lib/slot.h"

/* A pod that reaches itself sees this address: 169.254.42.1, or fd00:fb:42::1. */
static __always_inline void forward_hairpin(struct fib_addr *addr, __u32 family)
{
	if (family == 4) {
		fib_addr_set_v4(addr, bpf_htonl(0xa9fe2a01));
		return;
	}
	addr->w[0] = bpf_htonl(0xfd0000fb);
	addr->w[1] = bpf_htonl(0x00420000);
	addr->w[2] = 0;
	addr->w[3] = bpf_htonl(1);
}

/* The node's address towards backends; false: it has none. */
static __always_inline bool forward_node(const struct lb_config *config, __u32 family, struct fib_addr *node)
{
	if (family == 4) {
		fib_addr_set_v4(node, config->snat_v4);
		return config->snat_v4;
	}
	*node = config->snat_v6;
	return node->q[0] | node->q[1];
}

/* An error that may be about a translated packet. */
static __always_inline bool forward_is_error(const struct pkt_ctx *pkt)
{
	if (pkt->flags & PKT_FRAG_LATER)
		return false;
	if (pkt->proto == IPPROTO_ICMP)
		return pkt->icmp_type == 3 || pkt->icmp_type == 11 || pkt->icmp_type == 12;
	return pkt->proto == IPPROTO_ICMPV6 && pkt->icmp_type - 1u < 4;
}

/* Leaves it to another program, or returns if that is not there. */
static __always_inline void forward_leave(struct __sk_buff *skb, __u32 tail, bool uplink)
{
	struct lb_work *work = lb_work();

	if (!work)
		return;
	work->uplink = uplink;
	lb_tails.call(skb, tail);
}

/* The client is told that its packet is too big for `mtu`, or that there is no backend (0). */
static __always_inline int forward_reject(struct __sk_buff *skb, struct pkt_ctx *pkt, __u32 mtu)
{
	struct lb_work *work = lb_work();

	if (!work)
		return TC_ACT_SHOT;
	work->mtu = mtu;
	lb_tails.call(skb, LB_TAIL_REJECT);
	return verdict_drop(skb, pkt, mtu ? REASON_LB_TOO_BIG : REASON_LB_NO_BACKEND);
}

/* A packet that no backend gets. */
static __always_inline int forward_refuse(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct lb_way *way,
					  enum way_kind kind)
{
	if (kind == WAY_SOURCE)
		return verdict_drop(skb, pkt, REASON_LB_SOURCE);
	if (way->service && way->service->flags & LB_SVC_DROP)
		return verdict_drop(skb, pkt, REASON_LB_NO_BACKEND);
	return forward_reject(skb, pkt, 0);
}

/* Records the translation of a packet whose backend sees it come from `local`, if that is due. `nat` are LB_NAT_*.
 * False: *action ends the packet's way. */
static __always_inline bool forward_record(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct lb_config *config,
					   struct lb_way *way, const struct fib_addr *local, __u32 nat, int *action)
{
	struct lb_work *work;
	enum nat_result result;

	if (likely(way->flow && way->stamp == way->state.stamp))
		return true;
	work = lb_work();
	if (!work) {
		*action = TC_ACT_SHOT;
		return false;
	}
	__builtin_memset(work, 0, sizeof(*work));
	work->key.remote = way->backend->addr;
	work->key.local = *local;
	work->key.rport = way->port;
	work->key.proto = pkt->proto;
	work->nat.client = pkt->src;
	work->nat.vip = pkt->dst;
	work->nat.cport = pkt->sport;
	work->nat.vport = pkt->dport;
	work->nat.backend = way->backend->id;
	work->nat.stamp = way->stamp;
	work->nat.flags = nat;
	work->sig = way->sig;
	work->uplink = pkt->direction == DIR_FROM_UPLINK;
	/* A client that keeps its address keeps its port, unless two of its connections are one at the backend. */
	work->key.lport = way->state.port;
	if (!work->key.lport) {
		work->key.lport = pkt->sport;
		/* SCTP's ports cannot be changed. */
		if (nat & LB_NAT_SNAT && pkt->proto != IPPROTO_SCTP)
			work->key.lport = bpf_htons(nat_port(config, nat_first(way->sig, nat_ports(config))));
	}
	result = NAT_TAKEN;
	if (work->key.lport)
		result = nat_write(config, &work->key, &work->nat);
	if (likely(result == NAT_OK)) {
		if (work->key.lport != pkt->sport || nat & LB_NAT_SNAT)
			way->state.port = work->key.lport;
		return true;
	}
	if (result == NAT_TAKEN) {
		/* A fragment's ports are not its own. */
		if (pkt->proto != IPPROTO_SCTP && !(pkt->flags & PKT_FRAG_LATER) && !nat_exhausted(config, &work->key))
			lb_tails.call(skb, LB_TAIL_SEARCH);
		*action = verdict_drop(skb, pkt, REASON_LB_NO_PORT);
		return false;
	}
	lb_count(LB_STAT_NAT_FULL);
	*action = verdict_drop(skb, pkt, REASON_LB_NAT_FULL);
	return false;
}

/* Rewrites the packet for its backend, which sees it come from `local`. */
static __always_inline bool forward_translate(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct lb_way *way,
					      const struct fib_addr *local)
{
	struct ends to = { .src = *local, .dst = way->backend->addr, .dport = way->port };

	to.sport = way->state.port ? way->state.port : pkt->sport;
	return translate(skb, pkt, &to);
}
