/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `prefilter`, version 1: sources whose packets are dropped or let through, and how many a second.
 *
 * IPv4: a root cell for each /12, and where a /12 is not all of one set, a page of cells, one for each /24. A cell has the
 * set of the longest prefix of at most 24 bits, and which lengths beyond 24 exist within: those are in a hash. So a source
 * costs two loads, and one more for each such length. A million single addresses take 32 MiB of pages and 13 MiB of hash.
 * IPv6: a hash of all prefixes, asked for each length that a hint by the source's first 32 bits names, longest first. A
 * million take 42 MiB.
 *
 * Tables are made in generations of two: a new one is built beside the one in force, and config.generation says which
 * counts, so that a whole set is replaced between two packets. Small changes are made in place, each with one store that
 * counts. Writer: the lb service (services/lb/prefilter/), through shared memory. Counters and rates: programs alone.
 */
#pragma once

#include "abi/addr.h"
#include "lib/likely.h"
#include "lib/maps.h"

#define PF_INNER (1 << 12)    /* BPF_F_INNER_MAP */
#define PF_MMAPABLE (1 << 10) /* BPF_F_MMAPABLE */

/* Tables of a generation, inner arrays of pf_lines at generation * PF_TABLES + table. */
enum pf_table {
	PF_CELLS = 0, /* PF_ROOT_LINES of root cells, then pages of PF_PAGE_LINES */
	PF_LONG4 = 1, /* IPv4 prefixes beyond /24: eight a line */
	PF_HINTS = 2, /* IPv6: 64 bits of lengths for each of PF_HINT_COUNT hashes of the first 32 bits */
	PF_TABLES = 4,
};

struct pf_line {
	__u64 words[8];
};

/* Five IPv6 prefixes, three words each: upper and lower half of the address in host order, and PF_META. The last word is 0
 * while no entry that would be in this line is in its other one. */
struct pf_wide {
	__u64 words[16];
};
#define PF_WIDE_ENTRIES 5
#define PF_WIDE_SPILLS 15

/* A root cell, 32 bits: the set, or this and the number of a page. */
#define PF_PAGE 0x80000000
#define PF_ROOT_LINES 256
#define PF_PAGE_LINES 128
/* A cell, 16 bits: the set in the low byte; above it, bit n: prefixes of 32 - n bits exist within. */
#define PF_CELL_SET 0xff

/* A line of PF_LONG4: words of prefix << 32 | length << 24 | set; 0: free. An entry is in one of two lines that its hash says. The
 * same holds for IPv6 and PF_META. */
#define PF_LONG4_SHIFT 24

/* check is the low half of the entry's hash: an entry that is being overwritten is no other one for a moment. */
#define PF_META(check, length, set) ((__u64)(check) << 32 | (length) << 8 | (set))

#define PF_HINT_COUNT 65536
#define PF_LENGTHS 64
/* Each rotation begins with other six bits: which bit is set in a word, without counting. */
#define PF_DE_BRUIJN 0x03f79d71b4cb0a89ull

/* pf_config.flags: what there is to be looked up. */
#define PF_V4 0x1
#define PF_V6 0x2
#define PF_LIMITS 0x4

/* A length of IPv6 prefixes: what it leaves of an address, in host order. */
struct pf_length {
	__u64 hi;
	__u64 lo;
	__u64 length;
	__u64 used; /* 0: no such length */
};

struct pf_generation {
	__u32 lines4; /* of PF_LONG4 */
	__u32 lines6; /* of pf_wides */
	__u64 always; /* lengths that hints say nothing about */
	struct pf_length lengths[PF_LENGTHS]; /* of bit n, at (1 << n) * PF_DE_BRUIJN >> 58; longer ones have lower bits */
};

/* One element. */
struct pf_config {
	__u32 flags;      /* PF_*; 0: nothing is declared */
	__u32 generation; /* 0 or 1 */
	__u64 stamp;      /* which declarations the tables hold; programs do not care */
	__u64 zero;       /* always; the verifier does not know, so it takes what begins with it for any number */
	__u64 reserved;
	struct pf_generation generations[2];
};
_Static_assert(sizeof(struct pf_config) == 4160, "ABI");

/* Number of a set: 1 to 255. */
#define PF_SETS 256
#define PF_ALLOW 0x1

struct pf_set {
	__u32 flags; /* PF_ALLOW; else deny */
};

#define PF_RULES 1024

/* Limits by prefix: the value is an index into pf_limits. */
struct pf_rule_key {
	__u32 bits;   /* 32 of family, then as many of the address as count */
	__be32 family; /* 4 or 6 */
	__be32 addr[4]; /* IPv4: in the first */
};
_Static_assert(sizeof(struct pf_rule_key) == 24, "ABI");

/* Times in units of 1/256 ns. */
struct pf_limit {
	__u64 interval; /* between two packets; 0: there is no such limit */
	__u64 burst;    /* how far a source may be ahead: (packets - 1) * interval */
	__u64 near;     /* 1: it is within fe80::/10, and holds for such sources */
};

struct pf_source {
	struct fib_addr addr; /* IPv6: the upper 64 bits */
	__u32 rule;
	__u32 pad;
};
_Static_assert(sizeof(struct pf_source) == 24, "ABI");

struct pf_counter {
	__u64 packets;
	__u64 bytes; /* Ethernet header included */
};

/* Elements of pf_counters: sets by number, then limits: packets dropped, and let through. */
#define PF_COUNT_DROPPED PF_SETS
#define PF_COUNT_PASSED (PF_SETS + PF_RULES)

/* Templates of inner maps; only their shape matters. */
FIB_MAP("array", __u32, struct pf_line, pf_line_t, 1, PF_MMAPABLE | PF_INNER);
FIB_MAP("array", __u32, struct pf_wide, pf_wide_t, 1, PF_MMAPABLE | PF_INNER);
FIB_MAP("lru_hash", struct pf_source, __u64, pf_source_t, 1, 0);

FIB_MAP("array", __u32, struct pf_config, pf_config, 1, PF_MMAPABLE);
FIB_MAP("array_of_maps$pf_line_t", __u32, __u32, pf_lines, 2 * PF_TABLES, 0);
/* By generation. */
FIB_MAP("array_of_maps$pf_wide_t", __u32, __u32, pf_wides, 2, 0);
FIB_MAP("array", __u32, struct pf_set, pf_sets, PF_SETS, PF_MMAPABLE);
FIB_MAP("lpm_trie", struct pf_rule_key, __u32, pf_rules, PF_RULES, BPF_F_NO_PREALLOC);
FIB_MAP("array", __u32, struct pf_limit, pf_limits, PF_RULES, PF_MMAPABLE);
/* 0: when each source may send again, in the units of pf_limit. */
FIB_MAP("array_of_maps$pf_source_t", __u32, __u32, pf_sources, 1, 0);
FIB_MAP("percpu_array", __u32, struct pf_counter, pf_counters, PF_SETS + 2 * PF_RULES, 0);
