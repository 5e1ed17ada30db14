/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Internet checksums (RFC 1071, RFC 1624) over 32-bit words as they lie in the packet. */
#pragma once

#include <linux/types.h>

/* Of a sum of fewer than 2^16 words: its 16 bits, not complemented. */
static __always_inline __u16 csum_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* What replacing a word by another adds to a sum. */
static __always_inline __u64 csum_change(__u32 from, __u32 to)
{
	return (__u64)(__u32)~from + to;
}

/* A checksum after a change. */
static __always_inline __u16 csum_apply(__u16 check, __u64 change)
{
	return ~csum_fold((__u16)~check + change);
}
