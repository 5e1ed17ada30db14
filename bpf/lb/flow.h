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

/* Which of the config's four limits a flow with these LB_FLOW_* (stamp >> 13) has, two bits each: syn_s for TCP that is
 * not confirmed, close_s for what is closing, tcp_s for TCP, any_s for the rest. */
#define FLOW_LIMITS (3 | 0 << 2 | 1 << 4 | 1 << 6 | 3 << 8 | 2 << 10 | 1 << 12 | 1 << 14)

/* After how many units of silence it is over. */
static __always_inline __u32 flow_limit(const struct lb_config *config, __u32 stamp)
{
	__u64 limits = *(const __u64 *)&config->syn_s;
	__u32 which = FLOW_LIMITS >> ((stamp >> 13) * 2) & 3;

	return ((limits >> (which * 16) & 0xffff) >> 2) + 1;
}

static __always_inline bool flow_alive(const struct lb_config *config, __u32 stamp, __u32 now)
{
	return flow_idle(stamp, now) <= flow_limit(config, stamp);
}

/* What follows chooses among a line's four flows without branches: which one it is cannot be predicted, and the line is
 * often not in the cache. Compilers would put the branches back if they saw through the values. */
#define FLOW_OPAQUE(value) asm volatile("" : "+r"(value))

/* 1 if not 0. */
static __always_inline __u64 flow_some(__u64 value)
{
	value |= -value;
	FLOW_OPAQUE(value);
	return value >> 63;
}

/* The larger one, of less than 2^63. */
static __always_inline __u64 flow_max(__u64 a, __u64 b)
{
	__u64 less = b - a;

	FLOW_OPAQUE(less);
	return b - (less & -(less >> 63));
}

/* The line that a flow is in, if it is anywhere; null: there is no table. */
static __always_inline struct lb_flow *flow_line(__u32 table, __u32 mask, __u64 sig)
{
	return lb_line(table, (__u32)sig & mask);
}

/* The flow in its line; null: it is not there. */
static __always_inline struct lb_flow *flow_in(struct lb_flow *line, __u64 sig, union flow_state *state)
{
	__u64 not0, not1, not2, not3, at;
	struct lb_flow *way = line;

	not0 = flow_some(FLOW_READ64(&way[0].sig) ^ sig);
	not1 = flow_some(FLOW_READ64(&way[1].sig) ^ sig);
	not2 = flow_some(FLOW_READ64(&way[2].sig) ^ sig);
	not3 = FLOW_READ64(&way[3].sig) ^ sig;
	at = not0 + (not0 & not1) + (not0 & not1 & not2);
	/* What the last one is matters only where it is that one: then both bits are set. */
	not3 &= -(at >> 1 & at & 1);
	way += at & (LB_FLOWS_A_LINE - 1);
	state->word = FLOW_READ64(&way->backend);
	return !(not3 | (FLOW_READ64(&way->sig) ^ sig)) ? way : 0;
}

/* How little a flow is missed: an older one of the same connection least, then free ones, those that are over, those
 * never confirmed, the one longest idle. The lowest bits are which one it is. */
static __always_inline __u64 flow_score(const struct lb_config *config, struct lb_flow *way, __u32 at, __u64 sig, __u32 now)
{
	__u64 other = FLOW_READ64(&way[at].sig);
	__u32 stamp = *(volatile __u16 *)&way[at].stamp, idle = flow_idle(stamp, now);
	/* Bit 63 of the difference: idle for longer than it may be. */
	__u64 same = flow_some(other ^ sig) ^ 1, free = flow_some(other) ^ 1, unconfirmed = (stamp >> 15 & 1) ^ 1;
	/* The sign of the difference: idle for longer than it may be. */
	__u64 over = ((__u64)flow_limit(config, stamp) - idle) >> 63;

	return same << 33 | free << 32 | over << 31 | unconfirmed << 30 | idle << 2 | at;
}
#define FLOW_SCORE_OVER (1ull << 31)

/* Writes a flow over the one of its line that is missed least. */
static __always_inline void flow_put_in(const struct lb_config *config, struct lb_flow *line, __u64 sig, union flow_state state,
					__u32 now)
{
	struct lb_flow *way = line;
	__u64 best;

	best = flow_max(flow_max(flow_score(config, way, 0, sig, now), flow_score(config, way, 1, sig, now)),
			flow_max(flow_score(config, way, 2, sig, now), flow_score(config, way, 3, sig, now)));
	way += best & (LB_FLOWS_A_LINE - 1);
	if (best < FLOW_SCORE_OVER)
		lb_count(LB_STAT_EVICTED);
	FLOW_READ64(&way->sig) = 0;
	FLOW_READ64(&way->backend) = state.word;
	FLOW_READ64(&way->sig) = sig;
}

static __always_inline void flow_put(const struct lb_config *config, __u64 sig, union flow_state state, __u32 now)
{
	struct lb_flow *line = flow_line(LB_FLOWS, config->flow_mask, sig);

	if (line)
		flow_put_in(config, line, sig, state, now);
}

/* The flow with that hash, unless it is over; null: a new one. `*state` is what it is. `line` is where it should be. */
static __always_inline struct lb_flow *flow_find_in(const struct lb_config *config, struct lb_flow *line, __u64 sig, __u32 now,
						    union flow_state *state)
{
	struct lb_flow *way = flow_in(line, sig, state);

	if (likely(way))
		return flow_alive(config, state->stamp, now) ? way : 0;
	if (likely(!config->before_mask))
		return 0;
	way = flow_line(LB_FLOWS_BEFORE, config->before_mask, sig);
	way = way ? flow_in(way, sig, state) : 0;
	if (!way || !flow_alive(config, state->stamp, now))
		return 0;
	flow_put_in(config, line, sig, *state, now);
	return way;
}

static __always_inline struct lb_flow *flow_find(const struct lb_config *config, __u64 sig, __u32 now,
						 union flow_state *state)
{
	struct lb_flow *line = flow_line(LB_FLOWS, config->flow_mask, sig);

	return line ? flow_find_in(config, line, sig, now, state) : 0;
}

/* Whether a packet of a flow that was found begins another connection between the same ports. */
static __always_inline bool flow_begins(__u32 stamp, __u8 proto, __u8 tcp_flags)
{
	return proto == IPPROTO_TCP && (tcp_flags & 0x12) == 0x02 && stamp & LB_FLOW_CLOSING; /* SYN without ACK */
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
