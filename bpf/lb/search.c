/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A port for a new connection where the first few are taken: all others are tried, two thousand a program, as often as
 * it takes. The steps are of a length that few connections share, so that they do not search side by side. When one is
 * found the packet begins anew, and finds its connection established. */
#pragma once

#include "lb/nat.h"
#include "lib/slot.h"

#define SEARCH_STEPS 2048

/* How far to go from port to port. A product of primes, each larger than there are ports, has no divisor in common
 * with their number: so all are met before the first comes again. */
static __always_inline __u32 search_stride(__u64 sig, __u32 count)
{
	__u64 stride = 1;

	stride *= sig & 1 << 8 ? 131101 : 131111;
	stride %= count;
	stride *= sig & 1 << 9 ? 131113 : 131129;
	stride %= count;
	stride *= sig & 1 << 10 ? 131143 : 131149;
	stride %= count;
	stride *= sig & 1 << 11 ? 131171 : 131203;
	stride %= count;
	stride *= sig & 1 << 12 ? 131213 : 131221;
	return stride % count;
}

/* 0 if a port is not to be had: another connection that is alive has it. Without branches, of which the verifier follows
 * a few thousand at most. */
static __always_inline __u64 search_usable(const struct lb_config *config, const struct lb_work *work, const struct lb_nat *other,
					   __u64 kind, __u32 now)
{
	__u32 stamp = other->stamp | kind;
	__u64 left = (__u64)flow_limit(config, stamp) - flow_idle(stamp, now), differs;

	FLOW_OPAQUE(left);
	differs = (other->client.q[0] ^ work->nat.client.q[0]) | (other->client.q[1] ^ work->nat.client.q[1]) |
		  (other->vip.q[0] ^ work->nat.vip.q[0]) | (other->vip.q[1] ^ work->nat.vip.q[1]) |
		  (other->cport ^ work->nat.cport) | (other->vport ^ work->nat.vport);
	FLOW_OPAQUE(differs);
	return left >> 63 | (flow_some(differs) ^ 1);
}

/* Goes on until key->lport is one that may be had, for a while. What the table was before it grew is not asked: nat_write
 * does. */
static __always_inline void search_some(const struct lb_config *config, struct lb_work *work, __u32 count)
{
	__u32 first = nat_range_size(config->snat_ports[0]), stride = search_stride(work->sig, count);
	__u32 now = work->nat.stamp & LB_STAMP;
	void *table = nat_table(0);
	__u64 n = work->at, beyond, kind = LB_FLOW_CONFIRMED | (work->key.proto == IPPROTO_TCP ? LB_FLOW_TCP : 0);

	FLOW_OPAQUE(kind);
	for (int step = 0; step < SEARCH_STEPS && table; step++) {
		struct lb_nat *other;

		n += stride;
		beyond = n - count;
		FLOW_OPAQUE(beyond);
		n = beyond + (count & -(beyond >> 63));
		/* As nat_port(). */
		beyond = n - first;
		FLOW_OPAQUE(beyond);
		beyond >>= 63;
		work->key.lport = bpf_htons((config->snat_ports[0] >> 16 & -beyond) +
					    (((config->snat_ports[1] >> 16) - first) & (beyond - 1)) + n);
		work->step++;
		other = bpf_map_lookup_elem_((uintptr_t)table, &work->key);
		if (!other)
			other = lb_nats_new.lookup(&work->key);
		if (!other || search_usable(config, work, other, kind, now))
			break;
	}
	work->at = n;
}

int fib_lb_search(struct __sk_buff *skb)
{
	struct lb_config *config = lb_configuration();
	struct pkt_ctx *pkt = slot_packet();
	struct lb_work *work = lb_work();
	union flow_state state = {};
	enum nat_result result;
	__u32 count;

	if (!config || !pkt || !work)
		return TC_ACT_SHOT;
	count = nat_ports(config);
	if (!count)
		return verdict_drop(skb, pkt, REASON_LB_NO_PORT);
	result = NAT_TAKEN;
	if (!work->step) {
		work->at = nat_first(work->sig, count);
		result = nat_begin(config, work->sig, &work->key, &work->nat);
	}
	if (result == NAT_TAKEN) {
		search_some(config, work, count);
		result = nat_write(config, &work->key, &work->nat);
	}
	if (result == NAT_FULL) {
		lb_count(LB_STAT_NAT_FULL);
		return verdict_drop(skb, pkt, REASON_LB_NAT_FULL);
	}
	if (result == NAT_TAKEN) {
		if (work->step < count)
			lb_tails.call(skb, LB_TAIL_SEARCH);
		nat_exhaust(config, &work->key);
		return verdict_drop(skb, pkt, REASON_LB_NO_PORT);
	}
	state.backend = work->nat.backend;
	state.port = work->key.lport;
	state.stamp = work->nat.stamp;
	flow_put(config, work->sig, state, work->nat.stamp & LB_STAMP);
	lb_count(LB_STAT_NEW);
	if (work->uplink)
		lb_tails.call(skb, LB_TAIL_UPLINK);
	else
		pl_slots.call(skb, SLOT_LB);
	return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
}
