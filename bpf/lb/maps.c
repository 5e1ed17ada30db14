/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The maps of family `lb`, made before and without any program that uses them: so that services can be put into the
 * kernel whatever it refuses of the rest. The loader wants a program to every unit; this one is never attached. */
#include <uapi/linux/bpf.h>
#include <linux/types.h>
#include "abi/lb.h"

int fib_lb_maps(struct xdp_md *ctx)
{
	return lb_configuration() ? XDP_PASS : XDP_ABORTED;
}
