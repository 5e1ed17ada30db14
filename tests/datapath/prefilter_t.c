/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The prefilter alone: what it lets through, another program would get. */
#include <uapi/linux/bpf.h>
#include "lb/prefilter.h"

int fib_prefilter_t(struct xdp_md *ctx)
{
	return prefilter_check(ctx);
}
