/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `lb`, version 2: services, their backends, and the connections that go through them.
 *
 * Frontends are in a hash; all else that a packet needs are lines of 64 bytes in arrays, which user space writes
 * through shared memory: changing one backend of ten thousand is one store, and no lookup but the first hashes.
 * Every table is the inner map of an outer array, so that it grows by building a larger one and flipping the pointer.
 *
 * Writer of all but lb_flows (BPF), lb_nats (BPF), lb_socks* (BPF), lb_affinity (BPF), lb_stats (BPF), lb_frags (BPF): the lb service
 * (services/lb/kernel/). Readers: programs of the lb service. A backend is named by its id: index in the low 20
 * bits, and a generation above, so that what remembers an id sees that the place has been given to another.
 */
#pragma once

#include "abi/addr.h"
#include "lib/likely.h"
#include "lib/maps.h"

#define LB_INNER (1 << 12)    /* BPF_F_INNER_MAP: inner arrays may differ in size */
#define LB_MMAPABLE (1 << 10) /* BPF_F_MMAPABLE */

#define LB_SERVICE_MAX 65536
#define LB_BACKEND_INDEX 0xfffff
#define LB_SLOTS_A_LINE 16
#define LB_HINTS 65536
#define LB_NATS_NEW 16384

/* lb_lines: what its inner arrays hold, one kind each. */
enum lb_table {
	LB_SERVICES = 0,     /* struct lb_service by index; index 0 is never used */
	LB_BACKENDS = 1,     /* struct lb_backend by the index in its id; index 0 is never used */
	LB_SLOTS = 2,        /* backend ids, sixteen a line: services' tables are stretches of it */
	LB_FLOWS = 3,        /* struct lb_flow, four a line; the number of lines is a power of two */
	LB_FLOWS_BEFORE = 4, /* what LB_FLOWS was before it grew: asked after a miss; none: no inner map */
	LB_HINT = 5,         /* a byte each of LB_HINTS: what addresses with this hash may be; 1,024 lines */
	LB_TABLES = 8,
};

struct lb_line {
	__u64 words[8];
};

/* lb_service.flags */
#define LB_SVC_MAGLEV 0x1        /* choose by the packet's hash, as every node does; else at random */
#define LB_SVC_AFFINITY 0x2      /* a client stays with its backend for affinity_s */
#define LB_SVC_SOURCES 0x4       /* only clients in lb_sources; concerns what comes from outside */
#define LB_SVC_DROP 0x8          /* without a backend: say nothing; else reject */
#define LB_SVC_DSR 0x10          /* TCP: backends answer clients directly, packets reach them by IP in IP */
#define LB_SVC_DSR_UDP 0x20      /* the same for all other protocols */
#define LB_SVC_LOCAL_OUTSIDE 0x40 /* external traffic policy local: the client's address is kept */

/* A stretch of LB_SLOTS. Written and read as one word. */
struct lb_stretch {
	__u32 first; /* slot, not line */
	__u32 count; /* 0: no backend */
};

struct lb_service {
	__u64 name; /* first 8 bytes of SHA-256 of the name; 0: nobody's. What a restarted service knows it by */
	__u32 flags;
	__u32 affinity_s;
	struct lb_stretch inside;  /* for clients in the cluster: pods and nodes */
	struct lb_stretch outside; /* for clients elsewhere */
	__u64 connections;         /* flows that began; written by programs alone */
	__u64 reserved[3];
};
_Static_assert(sizeof(struct lb_service) == 64, "ABI");

enum lb_backend_state {
	LB_BE_FREE = 0,        /* no such backend */
	LB_BE_ACTIVE = 1,      /* all states: established flows go on; which get new ones the stretches say */
	LB_BE_TERMINATING = 2,
	LB_BE_QUARANTINED = 3,
	LB_BE_MAINTENANCE = 4,
};

/* lb_backend.flags */
#define LB_BE_TX 0x1    /* mac is the next hop's on the interface ifindex: XDP needs no route lookup */
#define LB_BE_LOCAL 0x2 /* an address of this node, or of its pods */

struct lb_backend {
	struct fib_addr addr;
	__u32 id;      /* 0: free */
	__u32 service; /* index */
	__be16 port;
	__u8 state;    /* enum lb_backend_state */
	__u8 flags;    /* LB_BE_* */
	__u32 ifindex; /* with LB_BE_TX */
	__u8 mac[6];   /* next hop */
	__u16 mtu;     /* largest packet towards it, bytes, Ethernet header not counted; 0: not known */
	__u64 reserved[3];
};
_Static_assert(sizeof(struct lb_backend) == 64, "ABI");

/* Bits of a hint. */
#define LB_HINT_VIP 0x1     /* a frontend has such an address */
#define LB_HINT_RANGE 0x2   /* one with a range of ports */
#define LB_HINT_BACKEND 0x4 /* a backend has; what it sends may be an answer */
#define LB_HINT_NODE 0x8    /* this node has: node ports */

/* lb_front.flags */
#define LB_FRONT_OUTSIDE 0x1 /* node port, external, load balancer or host port: the outside stretch for clients elsewhere */
#define LB_FRONT_NODE 0x2    /* no frontend, but a mark: the address is this node's own */
#define LB_FRONT_EVERY 0x4   /* node port: the same at every node's addresses */

/* Port and protocol 0 with LB_FRONT_NODE. A node port has the unspecified address of its family
 * (::ffff:0.0.0.0 or ::). */
struct lb_front_key {
	struct fib_addr addr;
	__be16 port;
	__u8 proto;
	__u8 pad[5];
};
_Static_assert(sizeof(struct lb_front_key) == 24, "ABI");

struct lb_front {
	__u32 service; /* index */
	__u16 first;   /* first port of the range, host order: a backend gets as much above its own port */
	__u16 flags;   /* LB_FRONT_* */
};
_Static_assert(sizeof(struct lb_front) == 8, "ABI");

/* A range of ports is as many of these as it takes: prefixes of the port. */
struct lb_range_key {
	__u32 bits; /* 16 bytes of address, 2 of protocol, then so many bits of port */
	__be32 addr[4];
	__be16 proto;
	__be16 port;
};
_Static_assert(sizeof(struct lb_range_key) == 24, "ABI");

struct lb_source_key {
	__u32 bits; /* 32 of service, then as many of the address's 128 as count */
	__be32 service;
	__be32 addr[4];
};
_Static_assert(sizeof(struct lb_source_key) == 24, "ABI");

/* A connection, seen from its client: which backend it has. 16 bytes, so that a line holds four; where all four are
 * taken, one that never was confirmed goes first, then the one longest idle: a flood of SYNs displaces only itself. */
struct lb_flow {
	__u64 sig;     /* hash of client, frontend and protocol; 0: free */
	__u32 backend; /* id, XORed with the upper half of sig */
	__be16 port;   /* SNAT: the node's port towards the backend; else 0 */
	__u16 stamp;   /* LB_STAMP of its last packet, and LB_FLOW_* */
};
_Static_assert(sizeof(struct lb_flow) == 16, "ABI");
#define LB_FLOWS_A_LINE 4
#define LB_FLOW_CONFIRMED 0x8000 /* the client has spoken again: no stray SYN */
#define LB_FLOW_CLOSING 0x4000   /* FIN or RST seen */
#define LB_FLOW_TCP 0x2000
#define LB_STAMP 0x1fff          /* 4 beats each: wraps after nine hours */

/* A translated connection, seen from its backend: (backend, whom it answers) -> the client and whom that
 * client spoke to. Without SNAT `local` is the client itself. */
struct lb_tuple {
	struct fib_addr remote; /* backend */
	struct fib_addr local;
	__be16 rport;
	__be16 lport;
	__u8 proto;
	__u8 pad[3];
};
_Static_assert(sizeof(struct lb_tuple) == 40, "ABI");

/* lb_nat.flags */
#define LB_NAT_SNAT 0x1    /* local is this node: answers go back out where the client is */
#define LB_NAT_HAIRPIN 0x2 /* client and backend are one pod */
#define LB_NAT_OUTSIDE 0x4 /* the client came by an uplink: answers leave by one */

struct lb_nat {
	struct fib_addr client;
	struct fib_addr vip;
	__be16 cport;
	__be16 vport;
	__u32 backend; /* id */
	__u16 stamp;   /* LB_STAMP, LB_FLOW_CLOSING */
	__u8 flags;    /* LB_NAT_* */
	__u8 pad[5];
};
_Static_assert(sizeof(struct lb_nat) == 48, "ABI");

/* lb_sock_key.kind */
#define LB_SOCK_OWN 0  /* a socket's first translation, a connected one's only one; address and port 0 */
#define LB_SOCK_TO 1   /* what an unconnected UDP socket sends to further frontends: by frontend */
#define LB_SOCK_FROM 2 /* and whom answers come from: by backend */

/* A socket whose destination was translated. Its entries are removed when it is closed. */
struct lb_sock_key {
	__u64 cookie;
	struct fib_addr addr;
	__be16 port;
	__u8 proto;
	__u8 kind; /* LB_SOCK_OWN, ... */
	__u8 pad[4];
};
_Static_assert(sizeof(struct lb_sock_key) == 32, "ABI");

/* lb_sock.flags */
#define LB_SOCK_CONNECTED 0x1 /* by connect(): bound to its backend; else each datagram is translated anew */
#define LB_SOCK_DIRECT 0x2    /* has spoken to the backend itself since: answers come from there */
#define LB_SOCK_FURTHER 0x4   /* what is behind LB_SOCK_HOT means something; else it is what was there before */

struct lb_sock {
	struct fib_addr vip;
	struct fib_addr addr; /* backend */
	__u64 netns : 48;     /* cookie; they are given out one after the other */
	__u64 flags : 8;      /* LB_SOCK_*, in LB_SOCK_OWN */
	__u64 proto : 8;
	__u32 backend; /* id */
	__be16 vport;
	__be16 port; /* backend's */
	struct fib_addr next; /* with nport: key of the next LB_SOCK_TO of this socket, newest first */
	__be16 nport;         /* 0: no further one */
	__u16 pad;
	__u32 further; /* LB_SOCK_TO of this socket, in LB_SOCK_OWN */
};
_Static_assert(sizeof(struct lb_sock) == 72, "ABI");
/* Bytes that a first connect() writes: with what comes before it in lb_socks_near, a line of the cache. */
#define LB_SOCK_HOT 48

/* In front of lb_socks: entries of kind LB_SOCK_OWN by the low bits of the cookie. Cookies are given out one after the
 * other, so that sockets that come and go use neighbouring slots, which the cache has; a place in the hash it seldom has.
 * Where a slot is taken the entry is in the hash, and the slot counts it: without such there is nothing to ask. */
#define LB_SOCK_NEAR 16384
struct lb_sock_near {
	__u64 cookie; /* 0: nobody's */
	__u32 claims; /* 1: taken; more only while somebody sees that it is */
	__u32 crowd;  /* entries in the hash that belong here */
	struct lb_sock entry;
	__u64 pad[5];
};
_Static_assert(sizeof(struct lb_sock_near) == 128, "ABI");

/* A client of a service with affinity: its address, or for sockets its namespace's cookie in q[0] and 0 in q[1]. */
struct lb_client {
	struct fib_addr addr;
	__u32 service; /* index */
	__u32 pad;
};
_Static_assert(sizeof(struct lb_client) == 24, "ABI");

struct lb_sticky {
	__u32 backend; /* id */
	__u32 beat;    /* of its last use */
};

/* The first fragment's ports, for those that follow. */
struct lb_frag_key {
	struct fib_addr src;
	struct fib_addr dst;
	__u32 id;
	__u8 proto;
	__u8 pad[3];
};
_Static_assert(sizeof(struct lb_frag_key) == 40, "ABI");

struct lb_frag {
	__be16 sport;
	__be16 dport;
};

/* A backend towards which no port of the node was left: what a packet found full is not searched again for a beat. */
struct lb_full_key {
	struct fib_addr addr;
	__be16 port;
	__u8 proto;
	__u8 pad[5];
};
_Static_assert(sizeof(struct lb_full_key) == 24, "ABI");

struct lb_full {
	__u64 times; /* connections refused */
	__u32 beat;
	__u32 pad;
};

/* lb_config.flags */
#define LB_CFG_NETNS 0x1 /* sockets: only those of host_netns and of pods (ep_netns) are translated */

/* One element. */
struct lb_config {
	__u64 seed;        /* of the hash that all nodes of a cluster share */
	__u64 host_netns;  /* cookie of the node's own network namespace */
	__u32 flow_mask;   /* lines of LB_FLOWS less one */
	__u32 before_mask; /* the same of LB_FLOWS_BEFORE; 0: there is none */
	__u32 beat_shift;  /* jiffies >> this: beats, of about a second */
	__u32 flags;       /* LB_CFG_* */
	__u16 syn_s;       /* seconds of silence after which a flow is over: TCP, only SYN seen */
	__u16 close_s;     /* TCP, FIN or RST seen */
	__u16 tcp_s;       /* TCP */
	__u16 any_s;       /* all else */
	__be32 snat_v4;    /* this node's address towards backends; 0: no SNAT in this family */
	__u32 snat_ports[2]; /* two ranges of its ports, host order: first << 16 | last; 0: none */
	__u32 uplink_ifindex;
	struct fib_addr snat_v6;
	__u32 uplink_mtu;
	__u32 epoch; /* moves on with every change of lb_fronts: what programs remember of them is good for one */
	__u32 reserved[12];
};
_Static_assert(sizeof(struct lb_config) == 128, "ABI");

/* Elements of lb_stats; metric labels are these in lower case. */
enum lb_stat {
	LB_STAT_NEW = 0,       /* flows that began */
	LB_STAT_EVICTED = 1,   /* flows, still alive, that gave place to another */
	LB_STAT_NAT_FULL = 2,  /* translations that could not be recorded */
	LB_STAT_NO_PORT = 3,   /* no port of the node was left towards a backend */
	LB_STAT_REPAIRED = 4,  /* one half of a connection written again from the other */
	LB_STAT_REVERSED = 5,  /* packets from backends, translated back */
	LB_STAT_XDP_TX = 6,    /* packets sent on by XDP */
	LB_STAT_SOCK_FULL = 7, /* sockets whose translation could not be recorded */
	LB_STAT_SOCK = 8,      /* sockets translated */
	LB_STAT_COUNT = 16,
};

/* Templates of inner maps; only their shape matters. */
FIB_MAP("array", __u32, struct lb_line, lb_line_t, 1, LB_MMAPABLE | LB_INNER);
FIB_MAP("hash", struct lb_front_key, struct lb_front, lb_front_t, 1, BPF_F_NO_PREALLOC);
FIB_MAP("lru_hash", struct lb_tuple, struct lb_nat, lb_nat_t, 1, 0);

FIB_MAP("array_of_maps$lb_line_t", __u32, __u32, lb_lines, LB_TABLES, 0);
/* 0: frontends. */
FIB_MAP("array_of_maps$lb_front_t", __u32, __u32, lb_fronts, 1, 0);
/* 0: translations; 1: those before it grew, asked after a miss. */
FIB_MAP("array_of_maps$lb_nat_t", __u32, __u32, lb_nats, 2, 0);
/* Of TCP connections that have only said SYN: a flood of them displaces none of the others. */
FIB_MAP("lru_hash", struct lb_tuple, struct lb_nat, lb_nats_new, LB_NATS_NEW, 0);
FIB_MAP("lpm_trie", struct lb_range_key, struct lb_front, lb_ranges, 65536, BPF_F_NO_PREALLOC);
FIB_MAP("lpm_trie", struct lb_source_key, __u8, lb_sources, 262144, BPF_F_NO_PREALLOC);
FIB_MAP("hash", struct lb_sock_key, struct lb_sock, lb_socks, 524288, BPF_F_NO_PREALLOC);
FIB_MAP("array", __u32, struct lb_sock_near, lb_socks_near, LB_SOCK_NEAR, LB_MMAPABLE);
FIB_MAP("lru_hash", struct lb_client, struct lb_sticky, lb_affinity, 65536, 0);
FIB_MAP("lru_hash", struct lb_frag_key, struct lb_frag, lb_frags, 8192, 0);
FIB_MAP("array", __u32, struct lb_config, lb_config, 1, LB_MMAPABLE);
FIB_MAP("percpu_array", __u32, __u64, lb_stats, LB_STAT_COUNT, 0);
FIB_MAP("lru_hash", struct lb_full_key, struct lb_full, lb_exhausted, 1024, 0);

static __always_inline struct lb_config *lb_configuration(void)
{
	__u32 zero = 0;

	return lb_config.lookup(&zero);
}

static __always_inline void lb_count(__u32 stat)
{
	__u64 *count = lb_stats.lookup(&stat);

	if (count)
		++*count;
}

/* Line `index` of a table; null beyond its end, or where there is no such table. */
static __always_inline void *lb_line(__u32 table, __u32 index)
{
	void *inner = lb_lines.lookup(&table);

	return inner ? bpf_map_lookup_elem_((uintptr_t)inner, &index) : 0;
}

static __always_inline struct lb_service *lb_service(__u32 index)
{
	return lb_line(LB_SERVICES, index);
}

/* The backend of that id; null if it is gone. */
static __always_inline struct lb_backend *lb_backend(__u32 id)
{
	struct lb_backend *backend = lb_line(LB_BACKENDS, id & LB_BACKEND_INDEX);

	return backend && id && backend->id == id ? backend : 0;
}

/* The id in a slot; 0: none. */
static __always_inline __u32 lb_slot(__u32 slot)
{
	__u32 *line = lb_line(LB_SLOTS, slot / LB_SLOTS_A_LINE);

	return line ? line[slot % LB_SLOTS_A_LINE] : 0;
}

/* LB_HINT_* of an address: what it may be. Few addresses share a hint with another. */
static __always_inline __u32 lb_hint(const struct fib_addr *addr)
{
	__u32 fold = addr->w[3] ^ addr->w[2] * 3 ^ addr->w[1] * 5 ^ addr->w[0] * 7;
	__u32 hash = (fold * 0x9e3779b1) >> 16;
	__u8 *line = lb_line(LB_HINT, hash / 64);

	return line ? line[hash % 64] : 0;
}

/* Beats since the machine started. */
static __always_inline __u32 lb_beat(const struct lb_config *config)
{
	return bpf_jiffies64() >> (config->beat_shift & 63);
}

static __always_inline __u64 lb_mix(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * 0x9fb21c651e98df25ull;
	return hash ^ hash >> 35;
}

/* What a connection is known by on every node of the cluster: services/lb/abi.py computes the same. With affinity
 * the client's port is not part of it. Never 0. */
static __always_inline __u64 lb_hash(const struct lb_config *config, const struct fib_addr *client, __be16 cport,
				     const struct fib_addr *vip, __be16 vport, __u8 proto)
{
	/* The two run side by side in the processor. */
	__u64 hash = lb_mix(lb_mix(config->seed, client->q[0]), client->q[1]);
	__u64 other = lb_mix(lb_mix(~config->seed, vip->q[0]), vip->q[1]);

	hash += other;
	hash = lb_mix(hash, (__u64)cport << 32 | (__u64)vport << 16 | proto);
	/* Ports are in the upper half, which a product carries upwards only. */
	hash = lb_mix(hash, hash >> 32);
	return hash ? hash : 1;
}

/* One of a stretch's slots for 32 random or hashed bits. */
static __always_inline __u32 lb_stretch_slot(const struct lb_stretch *stretch, __u32 bits)
{
	return stretch->first + (__u32)((__u64)bits * stretch->count >> 32);
}
