/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Tells user space of connections: when they begin, end or are refused, never of each packet. */
#pragma once

#include "policy/work.h"

static __always_inline void report(const struct pkt_ctx *pkt, const struct pol_work *work, __u8 type, __u8 verdict, __u32 reason,
				   __u32 suppressed)
{
	struct pol_event *event = pol_events.ringbuf_reserve(sizeof(*event));

	if (!event) {
		pol_count(POL_STAT_LOST);
		return;
	}
	event->time = bpf_ktime_get_ns();
	event->src = *ct_source(pkt);
	event->dst = pkt->dst;
	event->src_id = pkt->src_id;
	event->dst_id = pkt->dst_id;
	event->src_identity = pkt->src_identity;
	event->dst_identity = pkt->dst_identity;
	event->rule = POL_RANGE_RULE(work->cell);
	event->revision = work->revision;
	event->suppressed = suppressed;
	event->reason = reason;
	event->sport = ct_source_port(pkt);
	event->dport = pkt->dport;
	event->type = type;
	event->verdict = verdict;
	event->direction = work->end;
	event->family = pkt->family;
	event->proto = pkt->proto;
	event->tcp_flags = pkt->tcp_flags;
	event->icmp_type = pkt->icmp_type;
	event->icmp_code = pkt->icmp_code;
	__builtin_memset(event->pad, 0, sizeof(event->pad));
	/* Nobody is woken: who reads them comes by itself. */
	pol_events.ringbuf_submit(event, BPF_RB_NO_WAKEUP);
}

/* A refusal: the first of its kind in each beat, with the number of those before it that were not told. */
static __always_inline void report_refusal(const struct pkt_ctx *pkt, const struct pol_work *work, __u32 now, __u8 type, __u8 verdict,
					   __u32 reason)
{
	struct pol_told_key key = {
		.endpoint = work->end == POL_EGRESS ? pkt->src_id : pkt->dst_id,
		.peer = work->end == POL_EGRESS ? pkt->dst_identity : pkt->src_identity,
		.dport = pkt->dport,
		.proto = pkt->proto,
		.direction = work->end,
	};
	struct pol_told *told = pol_told.lookup(&key), first = { .beat = now };
	__u32 suppressed = 0;

	if (told) {
		if (told->beat == now) {
			__sync_fetch_and_add(&told->suppressed, 1);
			pol_count(POL_STAT_SUPPRESSED);
			return;
		}
		suppressed = told->suppressed;
		told->suppressed = 0;
		told->beat = now;
	} else {
		pol_told.update(&key, &first);
	}
	report(pkt, work, type, verdict, reason, suppressed);
}
