/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Counting, and the end of pairs. */
#pragma once

/* States of TCP. */
#define SA_TCP_ESTABLISHED 1
#define SA_TCP_SYN_SENT 2
#define SA_TCP_CLOSE 7
#define SA_TCP_CLOSE_WAIT 8

static __always_inline void sa_count(__u32 which, __u64 by)
{
	__u64 *count = sa_stats.lookup(&which);

	if (count)
		*count += by;
}

static __always_inline void sa_tell(__u32 kind, const struct sa_pair *pair)
{
	struct sa_event *event = sa_events.ringbuf_reserve(sizeof(*event));

	if (!event) {
		sa_count(SA_STAT_LOST, 1);
		return;
	}
	event->time = bpf_ktime_get_ns();
	event->kind = kind;
	event->pad = 0;
	bpf_probe_read_kernel(&event->pair, sizeof(event->pair), pair);
	sa_events.ringbuf_submit(event, 0);
}

/* Whether all that ends[side] has handed over lies in the other's queue: called by a task that is at a socket of an ended pair, and so is in no
 * send() of before. If several tasks have handed over, one of them may still be about to. */
static __always_inline void sa_note_settled(struct sa_pair *pair, __u32 side)
{
	struct sa_end *me = &pair->ends[side & 1];

	if (me->task == bpf_get_current_task() && me->tasks == 1)
		me->settled = 1;
}

/* Whether nothing is, or will ever be again, in the queue of ends[side] of an ended pair. */
static __always_inline bool sa_is_empty(const struct sa_pair *pair, __u32 side)
{
	const struct sa_end *from = &pair->ends[!(side & 1)];

	return (!*(volatile __u32 *)&from->tasks || from->settled) && !sa_queue(pair->ends[side & 1].sock);
}

/* It is not shortened any more; the first reason stays. */
static __always_inline void sa_finish(struct sa_pair *pair, __u32 reason)
{
	if (!pair->ended)
		pair->ended = reason;
}
