/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What programs of this unit leave to each other: rare work is in programs of its own, reached by tail calls. */
#pragma once

#include "abi/lb.h"
#include "lib/answer.h"
#include "lib/maps.h"

enum lb_tail {
	LB_TAIL_UPLINK = 0, /* fib_lb_uplink, once more from the beginning */
	LB_TAIL_SEARCH = 1, /* a port for a new connection */
	LB_TAIL_REJECT = 2, /* the client is told */
	LB_TAIL_ICMP = 3,   /* an error about some packet */
	LB_TAIL_DECAP = 4,  /* from a balancer */
	LB_TAILS = 8,
};

/* Holds for one packet, as struct pkt_ctx does. Pinned: while programs are replaced, those of before leave it to those that go on. */
struct lb_work {
	struct lb_tuple key;
	struct lb_nat nat;
	__u64 sig;
	__u32 step;   /* of the search: ports tried */
	__u32 at;     /* number of the last one */
	__u32 mtu;    /* for LB_TAIL_REJECT: what the packet does not fit; 0: there is no backend */
	__u32 uplink; /* 1: at the uplink, else in slot LB */
	__u32 quote[ANSWER_QUOTE_WORDS];
};

/* enum lb_tail -> program. Writer: the lb service. */
FIB_MAP("prog", __u32, __u32, lb_tails, LB_TAILS, 0);
/* Writers and readers: programs of this unit. */
FIB_MAP("percpu_array", __u32, struct lb_work, lb_works, 1, 0);

static __always_inline struct lb_work *lb_work(void)
{
	__u32 zero = 0;

	return lb_works.lookup(&zero);
}
