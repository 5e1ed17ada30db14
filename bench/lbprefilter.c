/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What comes before the prefilter in its benchmark. fib_turn gives each packet another source, out of a list of 65,536;
 * fib_end ends it there, so that its own cost can be taken off. None is part of the product. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include "lib/maps.h"

#define SOURCES 65536

FIB_MAP("prog", __u32, __u32, next, 1, 0);
FIB_MAP("array", __u32, __be32, sources, SOURCES, 0);
FIB_MAP("array", __u32, __u32, turn, 1, 0);

int fib_turn(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct iphdr *ip = data + ETH_HLEN;
	__u32 zero = 0, *count = turn.lookup(&zero), at;
	__be32 *source;

	if ((void *)(ip + 1) > end || !count)
		return XDP_ABORTED;
	at = ++*count & (SOURCES - 1);
	source = sources.lookup(&at);
	if (!source)
		return XDP_ABORTED;
	ip->saddr = *source;
	next.call(ctx, 0);
	return XDP_ABORTED;
}

int fib_end(struct xdp_md *ctx)
{
	return XDP_PASS;
}
