/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Frames for bench/lbpps.py, and their end. The kernel's live frames use the same pages again and again, as whoever had them
 * last left them: fib_again makes the packet anew and hands it on, fib_sink counts what comes out at the other end. */
#include <uapi/linux/bpf.h>
#include "lib/maps.h"

#define WORDS 8

struct frame {
	__u64 words[WORDS];
};

FIB_MAP("prog", __u32, __u32, next, 1, 0);
FIB_MAP("array", __u32, struct frame, frames, 1, 0);
FIB_MAP("array", __u32, __u64, arrived, 1, 0);

int fib_again(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 zero = 0;
	struct frame *frame = frames.lookup(&zero);
	__u64 *words = data;

	if (!frame || data + sizeof(*frame) > end)
		return XDP_ABORTED;
#pragma unroll
	for (int at = 0; at < WORDS; at++)
		words[at] = frame->words[at];
	next.call(ctx, 0);
	/* Nobody to go on with: the host's stack. */
	return XDP_PASS;
}

int fib_sink(struct xdp_md *ctx)
{
	__u32 zero = 0;
	__u64 *count = arrived.lookup(&zero);

	if (count)
		__sync_fetch_and_add(count, 1);
	return XDP_DROP;
}
