/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `policy`, version 1: who may talk to whom, and the connections that do.
 *
 * What a policy says of a peer on a port is worked out by user space (services/policy/resolve/), completely: all that is left is
 * to find it. A policy divides all peers into classes of those it treats alike. A packet's peer has a class by its identity
 * (pol_peers) and, where a policy names prefixes, one by its address (pol_prefixes); the two together name a list of ranges of
 * protocol and port in order, each with its verdict. So rules, tiers and priorities do not exist here, a new identity is one entry
 * however many ports its peers have, and 16,000 entries are found like ten.
 *
 *   pol_eps[endpoint] ─▶ policy, revision ─▶ line of POL_POLICIES: peer table, prefix table, for each direction ─▶
 *   cells of POL_CELLS: [class of identity × classes of prefixes + class of prefix] ─▶ ranges
 *
 * All of a policy is written once and published by the one store to pol_eps that names it: a packet sees the whole of one policy or of the
 * other. A revision is never used twice on a node. The rest of the time the answer is in the connection's entry:
 * a packet whose revision there is the endpoint's passes without a look at any policy.
 *
 * Writer of pol_eps, pol_lines, pol_peers, pol_prefixes, pol_config: the policy service (services/policy/kernel/). Of all others:
 * programs. Readers: programs of the policy service; user space reads connections, counters and events.
 */
#pragma once

#include "abi/addr.h"
#include "abi/endpoint.h"
#include "abi/policy_eps.h"
#include "lib/likely.h"
#include "lib/maps.h"

#define POL_INNER (1 << 12)    /* BPF_F_INNER_MAP: inner arrays may differ in size */

/* pol_lines: what its inner arrays hold. */
enum pol_table {
	POL_POLICIES = 0, /* struct pol_policy; line 0 is never used */
	POL_CELLS = 1,    /* eight cells a line: class tables and ranges, as stretches */
	POL_TABLES = 2,
};

struct pol_line {
	__u64 words[8];
};

enum pol_direction {
	POL_INGRESS = 0,
	POL_EGRESS = 1,
};

/* pol_side.flags */
#define POL_ENFORCED 0x1 /* else everything is allowed */

struct pol_side {
	__u32 cells;    /* where its class table begins in POL_CELLS */
	__u16 prefixes; /* classes of prefixes; at least 1 */
	__u16 flags;    /* POL_ENFORCED */
};

/* A policy: a line. Never changed while an endpoint names it, but for rules of identities that nobody has yet. */
struct pol_policy {
	__u32 peers;    /* number of its table in pol_peers */
	__u32 prefixes; /* number of its table in pol_prefixes; 0: it names none */
	struct pol_side sides[2]; /* enum pol_direction */
	__u32 unknown;  /* class of an identity that user space has not heard of: as little as any that it could turn out to be */
	__u32 first;    /* its stretch of POL_CELLS, for user space that comes after the one that wrote it */
	__u32 count;
	__u32 reserved[7];
};
_Static_assert(sizeof(struct pol_policy) == 64, "ABI");

/* A cell of a class table: where the class's ranges begin and how many there are. */
#define POL_CLASS_FIRST(cell) ((__u32)(cell))
#define POL_CLASS_COUNT(cell) ((__u32)((cell) >> 32))

/* A cell of ranges, in order of protocol and port: from here to the next one's beginning. ICMP: types take the place of ports. The
 * first begins at protocol 0, port 0. */
#define POL_RANGE(proto, port, verdict, rule) \
	((__u64)(proto) << 56 | (__u64)(port) << 40 | (__u64)(verdict) << 32 | (__u64)(rule))
#define POL_RANGE_RULE(cell) ((__u32)(cell))
#define POL_RANGE_VERDICT(cell) ((__u8)((cell) >> 32))

/* Verdict of a range. The upper bits say what else. Room is left for a proxy's port: rules that need one name it by their number. */
#define POL_ALLOW 1
#define POL_DENY 2    /* by a rule */
#define POL_DEFAULT 3 /* no rule allows it */
#define POL_VERDICT 0x0f
#define POL_REJECT 0x10 /* tell the client */
#define POL_KEEP 0x20   /* not connections that were established when they were allowed */

/* Numbers of rules that no policy has; those of policies begin at 16. */
#define POL_RULE_NONE 0  /* no rule: nothing selects the endpoint, or nothing allows it */
#define POL_RULE_HOST 1  /* the node's host to its own pods */
#define POL_RULE_AUDIT 2 /* denied, but only audited */

/* Which identities exist: table 0 of pol_peers. */
#define POL_KNOWN 0

struct pol_peer {
	__u32 table;
	__u32 identity;
};

struct pol_prefix {
	__u32 bits;     /* 32 of the table, 128 of the address */
	__u32 table;
	__be32 addr[4]; /* as struct fib_addr */
};
_Static_assert(sizeof(struct pol_prefix) == 24, "ABI");

#define POL_PEERS_MAX (1 << 20)
#define POL_PREFIXES_MAX (1 << 17)

/* Both ends of a connection, the lower one first: packets of both directions have one key. ICMP echo: the id is
 * the port of who asks, CT_ECHO that of the other. Of other messages the type is the port of who sends them, and the other one is 0. */
#define CT_ECHO 0xffff

struct ct_key {
	struct fib_addr low;
	struct fib_addr high;
	__be16 low_port;
	__be16 high_port;
	__u8 proto;
	__u8 pad[3];
};
_Static_assert(sizeof(struct ct_key) == 40, "ABI");

/* ct_entry.flags */
#define CT_CLIENT_LOW 0x1   /* the lower end opened it */
#define CT_ANSWERED 0x2     /* a packet of the other end has been seen */
#define CT_CLIENT_FIN 0x4
#define CT_SERVER_FIN 0x8
#define CT_RESET 0x10
#define CT_CLOSED (CT_CLIENT_FIN | CT_SERVER_FIN | CT_RESET) /* any: see ct_limit */
#define CT_TOLD_CLOSED 0x20 /* its end has been reported */
#define CT_ALLOWED 0x40     /* << enum pol_direction: that policy has allowed it at some time */

#define CT_PASSES 0x100 /* the host's policy is not asked: forwarded for others, or older than that policy */
#define CT_PASSES_S 30  /* but for TCP: netfilter may have forgotten by then for whom, and what comes is the host's */

/* A connection. One entry for both directions and, where both ends are pods of this node, for both policies. */
struct ct_entry {
	__u32 revision[2]; /* enum pol_direction: of the policy that allowed it; 0: none has been asked */
	__u32 rule[2];
	__u32 client;      /* identities */
	__u32 server;
	__u32 seen;        /* beat of its last packet */
	__u32 flags;       /* CT_* */
	__u64 room;        /* makes the kernel's element 128 bytes: two cache lines, never three */
};
_Static_assert(sizeof(struct ct_entry) == 40, "ABI");

/* Ports of fragments. */
struct pol_frag {
	struct fib_addr src;
	struct fib_addr dst;
	__be32 id;
	__u32 proto;
};
_Static_assert(sizeof(struct pol_frag) == 40, "ABI");

struct pol_ports {
	__be16 sport;
	__be16 dport;
};

enum pol_event_type {
	POL_EVENT_NEW = 1, /* as in fibril.flow.v1.FlowType */
	POL_EVENT_CLOSED = 2,
	POL_EVENT_REVOKED = 3,
	POL_EVENT_DROP = 4,
};

enum pol_event_verdict {
	POL_EVENT_FORWARDED = 1, /* as in fibril.flow.v1.FlowVerdict */
	POL_EVENT_DROPPED = 2,
	POL_EVENT_AUDITED = 3,
};

/* One for each connection that begins, ends or is refused. */
struct pol_event {
	__u64 time;          /* ns, CLOCK_MONOTONIC */
	struct fib_addr src;
	struct fib_addr dst;
	__u32 src_id;        /* endpoint ids; 0: none of this node */
	__u32 dst_id;
	__u32 src_identity;
	__u32 dst_identity;
	__u32 rule;
	__u32 revision;
	__u32 suppressed;    /* like refusals since the last one told */
	__u16 reason;        /* enum drop_reason */
	__be16 sport;
	__be16 dport;
	__u8 type;           /* enum pol_event_type */
	__u8 verdict;        /* enum pol_event_verdict */
	__u8 direction;      /* enum pol_direction */
	__u8 family;
	__u8 proto;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 pad[6];
};
_Static_assert(sizeof(struct pol_event) == 88, "ABI");

/* What has been refused lately: told once a beat each. */
struct pol_told_key {
	__u32 endpoint;
	__u32 peer;     /* identity */
	__be16 dport;
	__u8 proto;
	__u8 direction;
};

struct pol_told {
	__u32 beat;
	__u32 suppressed;
};

/* pol_config.flags */
#define POL_CFG_AUDIT 0x1  /* all endpoints: report verdicts, let everything pass */
#define POL_CFG_HOST 0x2   /* the node's host may reach its own pods, whatever policy says */
#define POL_CFG_FLOWS 0x4  /* tell of connections that are allowed, too */

/* One element. */
struct pol_config {
	__u32 beat_shift; /* jiffies >> this: beats, of about a second */
	__u32 flags;      /* POL_CFG_* */
	__u32 syn_s;      /* seconds of silence after which a connection is over: TCP that nobody has answered */
	__u32 close_s;    /* TCP that both ends have closed, or one has reset */
	__u32 tcp_s;      /* TCP */
	__u32 any_s;      /* all else */
	__u32 revision;   /* the last one that was used; user space's */
	__u32 probe_port; /* UDP, of nodes' probes of each other, which the host's policy lets pass; 0: none */
	__u32 reserved[8];
};
_Static_assert(sizeof(struct pol_config) == 64, "ABI");

/* Elements of pol_stats; metric labels are these in lower case. */
enum pol_stat {
	POL_STAT_NEW = 0,         /* connections that were allowed */
	POL_STAT_ESTABLISHED = 1, /* of which both ends have spoken, and the first one again */
	POL_STAT_DENIED = 2,      /* packets */
	POL_STAT_REVOKED = 3,     /* packets of connections that are no longer allowed */
	POL_STAT_AUDITED = 4,     /* packets that would have been denied */
	POL_STAT_RELATED = 5,     /* ICMP errors about connections */
	POL_STAT_TABLE = 6,       /* connections that could not be recorded */
	POL_STAT_LOST = 7,        /* events that found no room */
	POL_STAT_SUPPRESSED = 8,  /* refusals not told one by one */
	POL_STAT_CHECKED = 9,     /* packets that policy was asked about */
	POL_STATS = 16,
};

#define CT_NEW_MAX 65536
#define POL_FRAGS 8192
#define POL_TOLD 4096

/* Templates of inner maps; only their shape matters. */
FIB_MAP("array", __u32, struct pol_line, pol_line_t, 1, POL_MMAPABLE | POL_INNER);
FIB_MAP("lru_hash", struct ct_key, struct ct_entry, ct_flow_t, 1, 0);

FIB_MAP("array_of_maps$pol_line_t", __u32, __u32, pol_lines, POL_TABLES, 0);
/* Class of an identity in a policy's table of peers; none: class 0, if it is known. */
FIB_MAP("hash", struct pol_peer, __u32, pol_peers, POL_PEERS_MAX, BPF_F_NO_PREALLOC);
/* Class of an address in a policy's table of prefixes; none: class 0. */
FIB_MAP("lpm_trie", struct pol_prefix, __u32, pol_prefixes, POL_PREFIXES_MAX, BPF_F_NO_PREALLOC);
FIB_MAP("array", __u32, struct pol_config, pol_config, 1, POL_MMAPABLE);
/* Connections that are established (0): a flood of beginnings cannot displace them, for those are in ct_new. */
FIB_MAP("array_of_maps$ct_flow_t", __u32, __u32, ct_flows, 1, 0);
FIB_MAP("lru_hash", struct ct_key, struct ct_entry, ct_new, CT_NEW_MAX, 0);
FIB_MAP("lru_hash", struct pol_frag, struct pol_ports, pol_frags, POL_FRAGS, 0);
FIB_MAP("lru_hash", struct pol_told_key, struct pol_told, pol_told, POL_TOLD, 0);
FIB_MAP("percpu_array", __u32, __u64, pol_stats, POL_STATS, 0);
/* struct pol_event records. */
FIB_RINGBUF(pol_events, 1 << 21);

static __always_inline struct pol_config *pol_configuration(void)
{
	__u32 zero = 0;

	return pol_config.lookup(&zero);
}

static __always_inline void pol_count(__u32 which)
{
	__u64 *count = pol_stats.lookup(&which);

	if (count)
		*count += 1;
}

/* Beats since the machine started. */
static __always_inline __u32 pol_beat(const struct pol_config *config)
{
	return bpf_jiffies64() >> (config->beat_shift & 63);
}
