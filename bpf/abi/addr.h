/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* One address type for both families, so that every map keyed by an address is one map. */
#pragma once

#include <uapi/linux/bpf.h>
#include <linux/types.h>

/* Network byte order; IPv4 a.b.c.d is ::ffff:a.b.c.d. `q` is the same bytes for copying and comparing. */
struct fib_addr {
	union {
		__be32 w[4];
		__u64 q[2];
	};
};
_Static_assert(sizeof(struct fib_addr) == 16, "ABI");

static __always_inline void fib_addr_set_v4(struct fib_addr *addr, __be32 v4)
{
	/* In whole words, on a little-endian machine: a reader of q[1] would wait for two halves to reach
	 * the cache. */
	addr->q[0] = 0;
	addr->q[1] = (__u64)v4 << 32 | bpf_htonl(0xffff);
}

/* `from` may be unaligned packet memory: the kernels Fibril runs on (x86-64, arm64) allow that. */
static __always_inline void fib_addr_set_v6(struct fib_addr *addr, const void *from)
{
	addr->q[0] = ((const __u64 *)from)[0];
	addr->q[1] = ((const __u64 *)from)[1];
}

static __always_inline bool fib_addr_is_v4(const struct fib_addr *addr)
{
	return !addr->q[0] && addr->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool fib_addr_same(const struct fib_addr *a, const struct fib_addr *b)
{
	return a->q[0] == b->q[0] && a->q[1] == b->q[1];
}
