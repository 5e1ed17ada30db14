/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What user space asks for, by running a program itself (BPF_PROG_TEST_RUN). */
#pragma once

/* (key of sa_pairs): whether anything that was handed over waits to be read at either end. Taking sockets out of the map throws it away. */
int fib_sa_waits(__u64 *ctx)
{
	__u64 key = ctx[0];
	struct sa_pair *pair = sa_pairs.lookup(&key);

	if (!pair)
		return 0;
#pragma unroll
	for (int side = 0; side < 2; side++) {
		const struct sa_end *end = &pair->ends[side];

		if (sa_read64(end->sock, AT_SK_COOKIE) == end->cookie && sa_queue(end->sock))
			return 1;
	}
	return 0;
}
