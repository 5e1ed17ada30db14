/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The only ways out of the pipeline. Each counts the packet and, if somebody watches, reports it. */
#pragma once

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/pkt_cls.h>
#include "abi/pipeline.h"

static __always_inline void verdict_count(struct __sk_buff *skb, __u32 reason, __u32 direction)
{
	__u32 key = reason * DIR_COUNT + direction;
	struct pl_counter *counter = pl_counters.lookup(&key);

	if (counter) {
		counter->packets++;
		counter->bytes += skb->len;
	}
}

/* A full ring buffer loses the event; user space sees that in the counters. */
static __always_inline void verdict_report(struct __sk_buff *skb, struct pkt_ctx *pkt, __u32 reason, __u32 verdict)
{
	struct event *event = pl_events.ringbuf_reserve(sizeof(*event));

	if (!event)
		return;
	event->time = bpf_ktime_get_ns();
	event->src_id = pkt->src_id;
	event->dst_id = pkt->dst_id;
	event->src_identity = pkt->src_identity;
	event->dst_identity = pkt->dst_identity;
	event->len = skb->len;
	event->ifindex = skb->ifindex;
	event->reason = reason;
	event->ethertype = pkt->ethertype;
	event->sport = pkt->sport;
	event->dport = pkt->dport;
	event->verdict = verdict;
	event->direction = pkt->direction;
	event->family = pkt->family;
	event->proto = pkt->proto;
	event->tcp_flags = pkt->tcp_flags;
	event->icmp_type = pkt->icmp_type;
	event->icmp_code = pkt->icmp_code;
	event->pad = 0;
	if (pkt->family) {
		event->src = pkt->src;
		event->dst = pkt->dst;
	} else {
		__u8 macs[2 * ETH_ALEN] = {};

		bpf_skb_load_bytes(skb, 0, macs, sizeof(macs));
		__builtin_memset(&event->src, 0, 2 * sizeof(event->src));
		__builtin_memcpy(&event->dst, macs, ETH_ALEN);
		__builtin_memcpy(&event->src, macs + ETH_ALEN, ETH_ALEN);
	}
	pl_events.ringbuf_submit(event, 0);
}

/* Ends the packet's way: TC_ACT_SHOT. `reason` is not REASON_NONE. */
static __always_inline int verdict_drop(struct __sk_buff *skb, struct pkt_ctx *pkt, __u32 reason)
{
	__u32 zero = 0;
	struct node_config *config = pl_config.lookup(&zero);

	/* Tells the verifier that the counter exists, and the reader that reasons are bounded. */
	if (reason >= REASON_COUNT)
		return TC_ACT_SHOT;
	verdict_count(skb, reason, pkt->direction);
	if (config && config->watch_drops)
		verdict_report(skb, pkt, reason, VERDICT_DROPPED);
	return TC_ACT_SHOT;
}

/* Lets the packet go on as `action` says: TC_ACT_UNSPEC (to what comes next on this hook, at last the stack
 * or the pod) or TC_ACT_REDIRECT. */
static __always_inline int verdict_pass(struct __sk_buff *skb, struct pkt_ctx *pkt, __u32 verdict, int action)
{
	__u32 zero = 0;
	struct node_config *config = pl_config.lookup(&zero);

	verdict_count(skb, REASON_NONE, pkt->direction);
	if (config && config->watch_forward && bpf_get_prandom_u32() % config->watch_forward == 0)
		verdict_report(skb, pkt, REASON_NONE, verdict);
	return action;
}
