/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Connections as their clients see them: a set-associative table in shared memory (struct lb_flow).
 *
 * No locks: a flow is two words, and the first, by which it is found, is read again after the second. What is lost in a
 * race or displaced is found again by the hash, which gives the same backend unless backends have changed since. For
 * tc and XDP.
 */
#pragma once

#include <uapi/linux/in.h>
#include "abi/lb.h"

/* Compilers must not keep what another CPU may change. */
#define FLOW_READ64(where) (*(volatile __u64 *)(where))

/* A copy of a flow's second word. */
union flow_state {
	__u64 word;
	struct {
		__u32 backend;
		__be16 port;
		__u16 stamp;
	};
};

static __always_inline __u32 flow_now(const struct lb_config *config)
{
	return (lb_beat(config) >> 2) & LB_STAMP;
}

/* Units of four beats since its last packet. */
static __always_inline __u32 flow_idle(__u32 stamp, __u32 now)
{
	return (now - stamp) & LB_STAMP;
}

/* After how many units of silence it is over. */
static __always_inline __u32 flow_limit(const struct lb_config *config, __u32 stamp)
{
	__u32 limit = stamp & LB_FLOW_TCP ? config->tcp_s : config->any_s;

	if (stamp & LB_FLOW_CLOSING)
		limit = config->close_s;
	else if (stamp & LB_FLOW_TCP && !(stamp & LB_FLOW_CONFIRMED))
		limit = config->syn_s;
	return (limit >> 2) + 1;
}

static __always_inline bool flow_alive(const struct lb_config *config, __u32 stamp, __u32 now)
{
	return flow_idle(stamp, now) <= flow_limit(config, stamp);
}

static __always_inline struct lb_flow *flow_in(__u32 table, __u32 mask, __u64 sig, union flow_state *state)
{
	struct lb_flow *way = lb_line(table, (__u32)sig & mask);

	if (!way)
		return 0;
#pragma unroll
	for (int at = 0; at < LB_FLOWS_A_LINE; at++, way++)
		if (FLOW_READ64(&way->sig) == sig) {
			state->word = FLOW_READ64(&way->backend);
			return FLOW_READ64(&way->sig) == sig ? way : 0;
		}
	return 0;
}

/* Writes a flow over the one of its line that is missed least. */
static __always_inline void flow_put(const struct lb_config *config, __u64 sig, union flow_state state, __u32 now)
{
	struct lb_flow *way = lb_line(LB_FLOWS, (__u32)sig & config->flow_mask), *victim = way;
	__u32 best = 0;

	if (!way)
		return;
#pragma unroll
	for (int at = 0; at < LB_FLOWS_A_LINE; at++, way++) {
		__u64 other = FLOW_READ64(&way->sig);
		__u32 stamp = *(volatile __u16 *)&way->stamp, score;

		if (!other || other == sig)
			score = 0x80000000;
		else
			score = 1 + flow_idle(stamp, now) + (stamp & LB_FLOW_CONFIRMED ? 0 : 0x10000) +
				(flow_alive(config, stamp, now) ? 0 : 0x20000);
		if (score > best) {
			best = score;
			victim = way;
		}
	}
	if (best < 0x20000)
		lb_count(LB_STAT_EVICTED);
	FLOW_READ64(&victim->sig) = 0;
	FLOW_READ64(&victim->backend) = state.word;
	FLOW_READ64(&victim->sig) = sig;
}

/* The flow with that hash, unless it is over; null: a new one. `*state` is what it is. */
static __always_inline struct lb_flow *flow_find(const struct lb_config *config, __u64 sig, __u32 now,
						 union flow_state *state)
{
	struct lb_flow *way = flow_in(LB_FLOWS, config->flow_mask, sig, state);

	if (likely(way))
		return flow_alive(config, state->stamp, now) ? way : 0;
	way = flow_in(LB_FLOWS_BEFORE, config->before_mask, sig, state);
	if (likely(!way) || !flow_alive(config, state->stamp, now))
		return 0;
	flow_put(config, sig, *state, now);
	return way;
}

/* What a packet of the flow makes of its stamp. */
static __always_inline __u16 flow_stamp(__u32 before, __u32 now, __u8 proto, __u8 tcp_flags)
{
	__u32 stamp = (before & ~LB_STAMP) | now;

	if (proto != IPPROTO_TCP)
		return stamp | LB_FLOW_CONFIRMED;
	stamp |= LB_FLOW_TCP;
	if (!(tcp_flags & 0x02)) /* SYN */
		stamp |= LB_FLOW_CONFIRMED;
	if (tcp_flags & 0x05) /* FIN, RST */
		stamp |= LB_FLOW_CLOSING;
	return stamp;
}

/* Notes a packet of the flow. Writes only what has changed, so that a busy flow's line stays shared between CPUs. */
static __always_inline void flow_touch(struct lb_flow *way, __u32 stamp, __u32 before)
{
	if (unlikely(stamp != before))
		*(volatile __u16 *)&way->stamp = stamp;
}
