/* Included, so that these tests also show map access from a header. */
#pragma once
#include "lib/maps.h"

FIB_MAP("hash", u32, u64, counts, COUNTS_MAX, BPF_F_NO_PREALLOC);
FIB_MAP("prog", u32, u32, slots, 4, 0);
FIB_RINGBUF(samples, 65536);

static __always_inline void count(u32 slot)
{
	u64 *seen = counts.lookup(&slot), one = 1;

	if (seen)
		__sync_fetch_and_add(seen, 1);
	else
		counts.update(&slot, &one);
}
