/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The first thing a packet meets: whether its source may send, and how much (abi/prefilter.h). For XDP. */
#pragma once

#include <uapi/linux/if_ether.h>
#include <uapi/linux/if_vlan.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include "abi/pipeline.h"
#include "abi/prefilter.h"

/* What user space may change meanwhile. */
#define PF_READ64(where) (*(volatile __u64 *)(where))

/* Entries of a line are compared without branches: which one it is cannot be predicted, and each branch would double the
 * ways that the verifier has to walk. Compilers would put them back if they saw through the values. */
#define PF_OPAQUE(value) asm volatile("" : "+r"(value))

/* All ones if 0. */
static __always_inline __u64 pf_none(__u64 value)
{
	value |= -value;
	PF_OPAQUE(value);
	return (value >> 63) - 1;
}

/* The packet's source. */
struct pf_from {
	__u64 hi; /* IPv6: upper half in host order; IPv4: the address */
	__u64 lo;
	bool v4;
	bool odd; /* it is not known for whom: pf_parse */
};

static __always_inline void *pf_line(__u32 generation, __u32 table, __u32 index)
{
	void *inner;

	table += generation * PF_TABLES;
	inner = pf_lines.lookup(&table);
	return inner ? bpf_map_lookup_elem_((uintptr_t)inner, &index) : 0;
}

/* The other line that an entry may be in; services/lb/prefilter/abi.py computes all hashes alike. */
static __always_inline __u32 pf_other(__u64 hash, __u32 lines)
{
	hash = (hash ^ hash >> 31) * 0x9fb21c651e98df25ull;
	return (hash >> 32) * lines >> 32;
}

/* The set of one IPv4 prefix beyond /24; 0: none. */
static __always_inline __u32 pf_long4(const struct pf_config *config, __u32 generation, __u32 prefix, __u32 length)
{
	__u64 key = (__u64)prefix << 8 | length, hash = key * 0x9e3779b97f4a7c15ull, *line, word, found = config->zero;
	__u32 lines = config->generations[generation].lines4, index = (hash >> 32) * lines >> 32;

	for (int probe = 0; probe < 2; probe++) {
		line = pf_line(generation, PF_LONG4, index);
		if (!line)
			return 0;
#pragma unroll
		for (int at = 0; at < 8; at++) {
			word = PF_READ64(&line[at]);
			found |= word & pf_none((word >> PF_LONG4_SHIFT) ^ key);
		}
		if (found)
			break;
		index = pf_other(hash, lines);
	}
	return found & PF_CELL_SET;
}

/* The set of the longest prefix that holds an address in host order; 0: none. */
static __always_inline __u32 pf_set4(const struct pf_config *config, __u32 generation, __u32 addr)
{
	__u32 *root = pf_line(generation, PF_CELLS, addr >> 24), found, longer, cell, length;
	__u16 *cells;

	if (!root)
		return 0;
	cell = root[addr >> 20 & 15];
	if (!(cell & PF_PAGE))
		return cell & PF_CELL_SET;
	cells = pf_line(generation, PF_CELLS, PF_ROOT_LINES + (cell & ~PF_PAGE) * PF_PAGE_LINES + (addr >> 13 & 127));
	if (!cells)
		return 0;
	cell = *(volatile __u16 *)&cells[addr >> 8 & 31];
	longer = cell >> 8;
	for (int at = 0; at < 8 && longer; at++, longer >>= 1) {
		if (!(longer & 1))
			continue;
		length = 32 - at;
		found = pf_long4(config, generation, addr >> at << at, length);
		if (found)
			return found;
	}
	return cell & PF_CELL_SET;
}

/* The set of one IPv6 prefix; 0: none. */
static __always_inline __u32 pf_one6(const struct pf_config *config, __u32 generation, __u64 hi, __u64 lo, __u64 length)
{
	__u64 hash = (hi ^ length) * 0x9fb21c651e98df25ull, wanted, meta, found = config->zero, *line;
	__u32 lines = config->generations[generation].lines6, index;
	void *inner = pf_wides.lookup(&generation);

	if (!inner)
		return 0;
	hash = ((hash ^ hash >> 35) + lo) * 0x9e3779b97f4a7c15ull;
	hash ^= hash >> 32;
	index = (hash >> 32) * lines >> 32;
	wanted = PF_META(hash, length, 0);
	for (int probe = 0; probe < 2; probe++) {
		line = bpf_map_lookup_elem_((uintptr_t)inner, &index);
		if (!line)
			return 0;
#pragma unroll
		for (int at = 0; at < PF_WIDE_ENTRIES; at++) {
			meta = PF_READ64(&line[3 * at + 2]);
			found |= meta & pf_none((meta ^ wanted) >> 8 | (PF_READ64(&line[3 * at]) ^ hi) |
						(PF_READ64(&line[3 * at + 1]) ^ lo));
		}
		if (found || !PF_READ64(&line[PF_WIDE_SPILLS]))
			break;
		index = pf_other(hash, lines);
	}
	return found & (PF_SETS - 1);
}

static __always_inline bool pf_link_local(const struct pf_from *from)
{
	return !from->v4 && from->hi >> 54 == 0xfe80 >> 6;
}

/* As pf_set4. */
static __always_inline __u32 pf_set6(const struct pf_config *config, __u32 generation, const struct pf_from *from)
{
	const struct pf_generation *now = &config->generations[generation];
	__u32 hint = ((__u32)(from->hi >> 32) * 0x9e3779b1) >> 16, found;
	__u64 *line = pf_line(generation, PF_HINTS, hint / 8), lengths, bit;
	const struct pf_length *length;

	if (!line)
		return 0;
	lengths = PF_READ64(&line[hint % 8]) | now->always;
	for (int at = 0; at < PF_LENGTHS && lengths; at++) {
		bit = lengths & -lengths;
		lengths ^= bit;
		length = &now->lengths[bit * PF_DE_BRUIJN >> 58];
		found = pf_one6(config, generation, from->hi & length->hi, from->lo & length->lo, length->length);
		if (found)
			return unlikely(pf_link_local(from)) && length->length < 10 ? 0 : found;
	}
	return 0;
}

static __always_inline void pf_count(__u32 element, __u64 bytes)
{
	struct pf_counter *counter = pf_counters.lookup(&element);

	if (counter) {
		counter->packets++;
		counter->bytes += bytes;
	}
}

static __always_inline int pf_drop(__u32 reason, __u64 bytes)
{
	__u32 key = reason * DIR_COUNT + DIR_FROM_UPLINK;
	struct pl_counter *counter = pl_counters.lookup(&key);

	if (counter) {
		counter->packets++;
		counter->bytes += bytes;
	}
	return XDP_DROP;
}

/* Whether a source is within its limit, if it has one. A bucket is the time at which it will be full again: a packet moves it
 * on by what a packet costs, and may not move it further ahead than a burst. */
static __always_inline int pf_limited(const struct pf_from *from, __u64 bytes)
{
	struct pf_rule_key key = { .bits = from->v4 ? 64 : 96, .family = bpf_htonl(from->v4 ? 4 : 6) };
	struct pf_source source = {};
	__u32 zero = 0, *rule, number;
	struct pf_limit *limit;
	__u64 *full, now, at;
	void *sources;
	__s64 ahead;

	if (from->v4) {
		key.addr[0] = bpf_htonl(from->hi);
		fib_addr_set_v4(&source.addr, key.addr[0]);
	} else {
		source.addr.q[0] = bpf_htonll(from->hi);
		key.addr[0] = source.addr.w[0];
		key.addr[1] = source.addr.w[1];
	}
	rule = pf_rules.lookup(&key);
	if (!rule)
		return XDP_PASS;
	number = *rule;
	limit = pf_limits.lookup(&number);
	sources = pf_sources.lookup(&zero);
	if (!limit || !limit->interval || !sources || number >= PF_RULES)
		return XDP_PASS;
	if (unlikely(pf_link_local(from)) && !limit->near)
		return XDP_PASS;
	source.rule = number;
	now = bpf_ktime_get_ns() << 8;
	full = bpf_map_lookup_elem_((uintptr_t)sources, &source);
	if (!full) {
		at = now + limit->interval;
		bpf_map_update_elem_((uintptr_t)sources, &source, &at, BPF_ANY);
		goto passed;
	}
	ahead = PF_READ64(full) - now;
	/* Further ahead than any packet could have moved it: the limit has changed, or time has gone round. */
	if (ahead < 0 || ahead > (__s64)(limit->burst + limit->interval) * 2) {
		*(volatile __u64 *)full = now + limit->interval;
	} else if (ahead > (__s64)limit->burst) {
		pf_count(PF_COUNT_DROPPED + number, bytes);
		return pf_drop(REASON_PREFILTER_RATE, bytes);
	} else {
		__sync_fetch_and_add(full, limit->interval);
	}
passed:
	pf_count(PF_COUNT_PASSED + number, bytes);
	return XDP_PASS;
}

/* The source of an IP packet behind at most two VLAN tags. More of them are odd: the host's stack takes off all that are mere
 * priorities, so what is behind them may be for it. */
static __always_inline bool pf_parse(struct xdp_md *ctx, struct pf_from *from)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end, *ip = data + ETH_HLEN;
	__be16 type;

	if (ip > end)
		return false;
	type = ((__be16 *)ip)[-1];
#pragma unroll
	for (int tags = 0; tags < 2; tags++) {
		if (likely(type != bpf_htons(ETH_P_8021Q) && type != bpf_htons(ETH_P_8021AD)))
			break;
		ip += 4;
		if (ip > end)
			return false;
		type = ((__be16 *)ip)[-1];
	}
	if (likely(type == bpf_htons(ETH_P_IP))) {
		if (ip + sizeof(struct iphdr) > end)
			return false;
		from->v4 = true;
		from->hi = bpf_ntohl(((struct iphdr *)ip)->saddr);
		return true;
	}
	from->odd = type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD);
	if (type != bpf_htons(ETH_P_IPV6) || ip + sizeof(struct ipv6hdr) > end)
		return false;
	from->v4 = false;
	from->hi = bpf_ntohll(((__be64 *)&((struct ipv6hdr *)ip)->saddr)[0]);
	from->lo = bpf_ntohll(((__be64 *)&((struct ipv6hdr *)ip)->saddr)[1]);
	return true;
}

/* XDP_DROP, or XDP_PASS: the packet goes on. What is not IP goes on. */
static __always_inline int prefilter_check(struct xdp_md *ctx)
{
	__u32 zero = 0, generation, number = 0;
	struct pf_config *config = pf_config.lookup(&zero);
	__u64 bytes = ctx->data_end - ctx->data;
	struct pf_from from = {};
	struct pf_set *set;

	if (likely(!config || !config->flags))
		return XDP_PASS;
	if (unlikely(!pf_parse(ctx, &from)))
		return from.odd ? pf_drop(REASON_MALFORMED, bytes) : XDP_PASS;
	generation = config->generation & 1;
	if (likely(from.v4)) {
		if (config->flags & PF_V4)
			number = pf_set4(config, generation, from.hi);
	} else if (config->flags & PF_V6) {
		number = pf_set6(config, generation, &from);
	}
	if (number) {
		pf_count(number, bytes);
		set = pf_sets.lookup(&number);
		return set && set->flags & PF_ALLOW ? XDP_PASS : pf_drop(REASON_PREFILTER_DENIED, bytes);
	}
	return config->flags & PF_LIMITS ? pf_limited(&from, bytes) : XDP_PASS;
}
