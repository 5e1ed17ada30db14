/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What a policy says of a peer on a port. */
#pragma once

#include "abi/policy.h"

/* Halvings of a list of ranges: 2^20 of them. */
#define LOOKUP_STEPS 20

static __always_inline void *lookup_line(__u32 table, __u32 index)
{
	void *inner = pol_lines.lookup(&table);

	return inner ? bpf_map_lookup_elem_((uintptr_t)inner, &index) : 0;
}

static __always_inline struct pol_policy *lookup_policy(__u32 index)
{
	return lookup_line(POL_POLICIES, index);
}

static __always_inline __u64 lookup_cell(__u32 index)
{
	__u64 *line = lookup_line(POL_CELLS, index / 8);

	return line ? line[index % 8] : 0;
}

/* Class of an identity: by its own entry, or 0 if it is known and the policy does not care for it. */
static __always_inline __u32 lookup_identity(const struct pol_policy *policy, __u32 identity)
{
	struct pol_peer key = { .table = policy->peers, .identity = identity };
	__u32 *class = pol_peers.lookup(&key);

	if (class)
		return *class;
	key.table = POL_KNOWN;
	return pol_peers.lookup(&key) ? 0 : policy->unknown;
}

static __always_inline __u32 lookup_address(const struct pol_policy *policy, const struct fib_addr *addr)
{
	struct pol_prefix key;
	__u32 *class;

	if (!policy->prefixes)
		return 0;
	key.bits = 32 + 128;
	key.table = policy->prefixes;
	__builtin_memcpy(key.addr, addr->w, sizeof(key.addr));
	class = pol_prefixes.lookup(&key);
	return class ? *class : 0;
}

/* The range that holds a protocol and port; 0: the tables are broken. */
static __always_inline __u64 lookup_range(__u64 class, __u8 proto, __u16 port)
{
	__u32 low = 0, high = POL_CLASS_COUNT(class), first = POL_CLASS_FIRST(class);
	__u64 wanted = POL_RANGE(proto, port, 0xff, 0xffffffff);

	/* In [low, high) the last one that begins at or before it. */
#pragma clang loop unroll(disable)
	for (int step = 0; step < LOOKUP_STEPS; step++) {
		__u32 middle = (low + high) / 2;

		if (high - low <= 1)
			break;
		if (lookup_cell(first + middle) <= wanted)
			low = middle;
		else
			high = middle;
	}
	return high > low ? lookup_cell(first + low) : 0;
}

/* The verdict on a peer in a direction: a cell of ranges. 0: the tables are broken. */
static __always_inline __u64 lookup_verdict(const struct pol_policy *policy, __u32 direction, __u32 identity,
					    const struct fib_addr *addr, __u8 proto, __u16 port)
{
	const struct pol_side *side = &policy->sides[direction & 1];
	__u32 class;

	if (!(side->flags & POL_ENFORCED))
		return POL_RANGE(0, 0, POL_ALLOW, POL_RULE_NONE);
	class = lookup_identity(policy, identity) * side->prefixes + lookup_address(policy, addr);
	return lookup_range(lookup_cell(side->cells + class), proto, port);
}
