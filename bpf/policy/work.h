/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What programs of this unit leave to each other: rare work is in programs of its own, reached by tail calls. */
#pragma once

#include "lib/answer.h"
#include "lib/maps.h"
#include "policy/ct.h"

enum pol_tail {
	POL_TAIL_DECIDE = 0,  /* packets that begin, end or change something */
	POL_TAIL_RELATED = 1, /* ICMP errors */
	POL_TAIL_REJECT = 2,  /* whoever sent it is told */
	POL_TAIL_OLDER = 3,   /* the host's policy denies it: is there a connection that is older? */
	POL_TAIL_OVERLAY = 4, /* on between the overlay and the host */
	POL_TAILS = 8,
};

/* skb->mark of refusals on their way from a pod's host side back into it, as if the pod had sent them. Pods cannot mark packets: the
 * mark goes when a packet leaves their namespace. */
#define POL_MARK 0x66

/* pol_work.host: whether the host's policy is asked, and by whom. */
enum pol_host {
	POL_HOST_NOT = 0,
	POL_HOST_BESIDE = 1,  /* after a pod's, which is the other end */
	POL_HOST_UPLINK = 2,
	POL_HOST_OVERLAY = 3,
};

/* Holds for one packet, as struct pkt_ctx does. Pinned: while programs are replaced, those of before leave it to those that go on. */
struct pol_work {
	struct ct_key key;
	struct ct_entry fresh;
	__u64 cell;     /* the verdict, as a range */
	__u32 end;      /* POL_EGRESS: of the sender's endpoint; POL_INGRESS: of the receiver's */
	__u32 policy;   /* in force at that end, and its revision: read once for all that follows */
	__u32 revision;
	__u32 unrelated; /* 1: POL_TAIL_RELATED or POL_TAIL_OLDER has looked in vain */
	__u32 host;      /* enum pol_host */
	__u32 through;   /* 1: what leaves as the host's, but is forwarded for others: only noted */
	__u32 reason;    /* for POL_TAIL_REJECT */
	__u32 quote[ANSWER_QUOTE_WORDS];
};

/* enum pol_tail -> program. Writer: the policy service. */
FIB_MAP("prog", __u32, __u32, pol_tails, POL_TAILS, 0);
/* Writers and readers: programs of this unit. */
FIB_MAP("percpu_array", __u32, struct pol_work, pol_works, 1, 0);

static __always_inline struct pol_work *pol_work(void)
{
	__u32 zero = 0;

	return pol_works.lookup(&zero);
}
