/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The maps of family `policy`, made before and without any program that uses them: what policies say is there before the first
 * packet is asked about. The loader wants a program to every unit; this one is never attached. */
#include <uapi/linux/bpf.h>
#include <linux/types.h>
#include "abi/policy.h"

int fib_policy_maps(struct xdp_md *ctx)
{
	return pol_configuration() ? XDP_PASS : XDP_ABORTED;
}
