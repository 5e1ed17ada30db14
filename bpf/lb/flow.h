/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Connections as their clients see them: a set-associative table in shared memory (struct lb_flow).
 *
 * No locks: a flow is two words, and the first, by which it is found, is read again after the second. Two writers of one
 * place may leave the first word of one with the second of the other: so each is written in terms of the other, and such a
 * flow names a backend that does not exist. What is lost in a race or displaced is found again by the hash, which gives the
 * same backend unless backends have changed since. For tc and XDP.
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

/* What the second word is XORed with. */
static __always_inline __u64 flow_own(__u64 sig)
{
	return sig >> 32;
}

static __always_inline __u32 flow_now(const struct lb_config *config)
{
	return (lb_beat(config) >> 2) & LB_STAMP;
}

/* Units of four beats since its last packet. */
static __always_inline __u32 flow_idle(__u32 stamp, __u32 now)
{
	return (now - stamp) & LB_STAMP;
}

/* By how many bits to move the config's four limits for a flow with these LB_FLOW_* (stamp >> 13), a byte each: to syn_s
 * for TCP that is not confirmed, close_s for what is closing, tcp_s for TCP, any_s for the rest; none for a free place. */
#define FLOW_LIMITS (63ull | 0ull << 8 | 16ull << 16 | 16ull << 24 | 48ull << 32 | 32ull << 40 | 16ull << 48 | 16ull << 56)

/* After how many units of silence it is over. */
static __always_inline __u64 flow_limit(const struct lb_config *config, __u32 stamp)
{
	__u64 limits = *(const __u64 *)&config->syn_s;

	return (limits >> (FLOW_LIMITS >> (stamp >> 13) * 8 & 63) >> 2 & 0x3fff) + 1;
}

static __always_inline bool flow_alive(const struct lb_config *config, __u32 stamp, __u32 now)
{
	return flow_idle(stamp, now) <= flow_limit(config, stamp);
}

#define FLOW_SCORE_OVER (1ull << 31)

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
	state->word = FLOW_READ64(&way->backend) ^ flow_own(sig);
	return !(not3 | (FLOW_READ64(&way->sig) ^ sig)) ? way : 0;
}

/* How little a flow is missed: what is over least, and free places; then those never confirmed or closing (a flood is answered by
 * resets); then the one longest idle. The lowest bits are which one it is. */
static __always_inline __u64 flow_score(const struct lb_config *config, struct lb_flow *line, __u32 at, __u32 now)
{
	__u32 stamp = *(volatile __u16 *)&line[at].stamp;
	__u64 idle = flow_idle(stamp, now);
	/* The sign of the difference: idle for longer than it may be. */
	__u64 over = (flow_limit(config, stamp) - idle) >> 32 & FLOW_SCORE_OVER;

	return over | ((~stamp | stamp << 1) & LB_FLOW_CONFIRMED) << 15 | idle << 2 | at;
}

static __always_inline void flow_write(struct lb_flow *way, __u64 sig, union flow_state state)
{
	FLOW_READ64(&way->sig) = 0;
	FLOW_READ64(&way->backend) = state.word ^ flow_own(sig);
	FLOW_READ64(&way->sig) = sig;
}

/* Frees its place: before a flow begins anew, for in its line it must be once. */
static __always_inline void flow_forget(struct lb_flow *way)
{
	FLOW_READ64(&way->sig) = 0;
	FLOW_READ64(&way->backend) = 0;
}

/* Writes a flow that is not in its line over the one there that is missed least. Returns its place. */
static __always_inline struct lb_flow *flow_put_in(const struct lb_config *config, struct lb_flow *line, __u64 sig,
						   union flow_state state, __u32 now)
{
	__u64 best = flow_max(flow_max(flow_score(config, line, 0, now), flow_score(config, line, 1, now)),
			      flow_max(flow_score(config, line, 2, now), flow_score(config, line, 3, now)));

	if (best < FLOW_SCORE_OVER)
		lb_count(LB_STAT_EVICTED);
	line += best & (LB_FLOWS_A_LINE - 1);
	flow_write(line, sig, state);
	return line;
}

/* Writes a flow, in its own place if it is there already. */
static __always_inline void flow_put(const struct lb_config *config, __u64 sig, union flow_state state, __u32 now)
{
	struct lb_flow *line = flow_line(LB_FLOWS, config->flow_mask, sig);

	union flow_state before;
	struct lb_flow *way;

	if (!line)
		return;
	way = flow_in(line, sig, &before);
	if (way)
		flow_write(way, sig, state);
	else
		flow_put_in(config, line, sig, state, now);
}

/* The flow with that hash, unless it is over; null: a new one. `*state` is what it is. `line` is where it should be. */
static __always_inline struct lb_flow *flow_find_in(const struct lb_config *config, struct lb_flow *line, __u64 sig, __u32 now,
						    union flow_state *state)
{
	struct lb_flow *way = flow_in(line, sig, state);

	if (likely(way)) {
		if (likely(flow_alive(config, state->stamp, now)))
			return way;
		flow_forget(way);
		return 0;
	}
	if (likely(!config->before_mask))
		return 0;
	way = flow_line(LB_FLOWS_BEFORE, config->before_mask, sig);
	way = way ? flow_in(way, sig, state) : 0;
	if (!way || !flow_alive(config, state->stamp, now))
		return 0;
	return flow_put_in(config, line, sig, *state, now);
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
