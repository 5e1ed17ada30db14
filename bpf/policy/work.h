/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What programs of this unit leave to each other: rare work is in programs of its own, reached by tail calls. */
#pragma once

#include "lib/maps.h"
#include "policy/ct.h"

enum pol_tail {
	POL_TAIL_DECIDE = 0,  /* packets that begin, end or change something */
	POL_TAIL_RELATED = 1, /* ICMP errors */
	POL_TAIL_REJECT = 2,  /* whoever sent it is told */
	POL_TAILS = 4,
};

/* Holds for one packet, as struct pkt_ctx does. */
struct pol_work {
	struct ct_key key;
	struct ct_entry fresh;
	__u64 cell;     /* the verdict, as a range */
	__u32 end;      /* POL_EGRESS: of the sender's endpoint; POL_INGRESS: of the receiver's */
	__u32 revision; /* of the policy that was asked */
	__u32 unrelated; /* 1: POL_TAIL_RELATED has looked in vain */
	__u32 reason;    /* for POL_TAIL_REJECT */
	__u32 quote[32];
};

FIB_MAP("prog", __u32, __u32, pol_tails, POL_TAILS, 0);
FIB_MAP("percpu_array", __u32, struct pol_work, pol_works, 1, 0);

static __always_inline struct pol_work *pol_work(void)
{
	__u32 zero = 0;

	return pol_works.lookup(&zero);
}
