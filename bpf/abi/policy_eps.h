/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Of the map family `policy`: which policy is in force for an endpoint. Apart, for programs that only have to know whether it is still
 * the same: a revision is never used twice on a node.
 */
#pragma once

#include "abi/endpoint.h"
#include "lib/maps.h"

#define POL_MMAPABLE (1 << 10) /* BPF_F_MMAPABLE */

/* pol_ep.flags */
#define POL_EP_AUDIT 0x1    /* report verdicts, let everything pass */
#define POL_EP_LOCKDOWN 0x2 /* let nothing pass */

/* What is in force for an endpoint. Zero: not known yet, which denies everything. Element 0 is the host's, whose owner is 0; there
 * zero means that nothing is asked. */
struct pol_ep {
	__u32 policy;   /* line of POL_POLICIES; these two are one store */
	__u32 revision;
	__u32 flags;    /* POL_EP_* */
	__u32 owner;    /* host-side ifindex of the pod it was written for: numbers of endpoints are used again */
};
_Static_assert(sizeof(struct pol_ep) == 16, "ABI");

/* Endpoint id -> policy. Writer: the policy service. Readers: programs of the policy and sockaccel services. */
FIB_MAP("array", __u32, struct pol_ep, pol_eps, EP_MAX, POL_MMAPABLE);
