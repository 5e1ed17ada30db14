/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What a program reports to user space about one packet (ring buffer pl_events). */
#pragma once

#include "abi/addr.h"

enum verdict {
	VERDICT_DROPPED = 1,   /* as in fibril.monitor.v1.Verdict */
	VERDICT_DELIVERED = 2, /* to a pod of this node */
	VERDICT_TO_STACK = 3,  /* to the host's network stack */
	VERDICT_TO_OVERLAY = 4, /* to another node, encapsulated */
	VERDICT_TO_NODE = 5,   /* to another node by a direct route */
};

struct event {
	__u64 time;          /* ns, CLOCK_MONOTONIC */
	struct fib_addr src; /* not IP: the MAC in the first six bytes */
	struct fib_addr dst;
	__u32 src_id;        /* endpoint ids, 0: not a pod of this node, or not looked up yet */
	__u32 dst_id;
	__u32 src_identity;  /* 0: not known */
	__u32 dst_identity;
	__u32 len;           /* bytes, Ethernet header included */
	__u32 ifindex;
	__u16 reason;        /* enum drop_reason */
	__be16 ethertype;
	__be16 sport;        /* 0: the protocol has none, or a later fragment */
	__be16 dport;
	__u8 verdict;        /* enum verdict */
	__u8 direction;      /* enum direction */
	__u8 family;         /* 4, 6, or 0: not IP */
	__u8 proto;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 pad;
};
_Static_assert(sizeof(struct event) == 80, "ABI");
