/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Nothing but the maps of family `lb`, for tests of what user space writes. */
#include <uapi/linux/bpf.h>
#include <linux/types.h>
#include "abi/lb.h"

int lb_maps(struct xdp_md *ctx)
{
	return lb_configuration() ? 2 : 0;
}
