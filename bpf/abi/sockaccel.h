/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `sockaccel`, version 2: TCP connections whose two ends are on this machine, and what is handed from one socket to the
 * other past the stack.
 *
 * Two sockets are of one connection if both have agreed on the same two initial sequence numbers and the client's address: 64 bits
 * chosen by the kernel for this connection, which no translation on the way changes (REDIRECT, DNAT, TPROXY). The client leaves them in
 * sa_opening when it is connected; the server, connected later, finds them.
 *
 *   client: sa_opening ─▶ server: sa_pairs[client's cookie], both in sa_socks, each with a struct sa_mine
 *
 * Writers: programs (bpf/sockaccel/) of all but sa_config, sa_spaces, sa_ports, sa_uids, sa_groups, sa_hosts and sa_off, which the sockaccel
 * service writes. Readers: programs; the service reads sa_pairs, sa_stats and sa_events.
 */
#pragma once

#include "abi/addr.h"
#include "lib/likely.h"
#include "lib/maps.h"

#define SA_CLASSES 32 /* bits of a mask */

#ifndef SA_PAIRS_MAX
#define SA_PAIRS_MAX 65536
#endif
#define SA_OPENING_MAX 16384
#define SA_SPACES_MAX 65536
#define SA_SPLICERS_MAX 4096
#define SA_BLOCKING_MAX 16384
#define SA_MESSAGE 256      /* what a send that waits unread counts for besides its bytes: the kernel keeps some 1000 bytes for each */
#define SA_WAITS (1U << 31)
#define SA_MESSAGES_MAX 256 /* so many may wait, whatever their size */

/* sa_config.flags */
#define SA_CFG_ON 0x1     /* anything may be shortened */
#define SA_CFG_GROUPS 0x2 /* some class asks for control groups */
#define SA_CFG_CALLS 0x4  /* the programs behind recv() and send() are attached: without them nothing is shortened */
#define SA_CFG_NONBLOCKING 0x8 /* sa_config.nonblocking counts: older services do not know it */

/* One element. */
struct sa_config {
	__u32 flags;     /* SA_CFG_* */
	__u32 epoch;     /* every pair is judged anew when it changes */
	__u32 classes;   /* mask: those that are switched on */
	__u32 any_port;  /* mask: those that name no ports */
	__u32 any_group; /* mask: those that name no control groups */
	__u32 proxies;   /* mask: those that want a proxy at one end */
	__u32 same;      /* mask: for connections within one pod */
	__u32 pods;      /* mask: between pods of this node */
	__u32 host;      /* mask: between the host and its pods */
	__u32 within;    /* mask: within the host */
	__u32 run_bytes; /* of one end without a word of the other: more is bulk */
	__u32 proofs;    /* changes of speaker on TCP before a pair is shortened */
	__u64 beat_ns;   /* a shortened pair sends over TCP once in this time, so that nobody on the way forgets it */
	__u32 nonblocking; /* mask: those whose ends must not wait in recv() */
	__u32 pad;
};
_Static_assert(sizeof(struct sa_config) == 64, "ABI");

/* sa_space.flags */
#define SA_SPACE_PROXIED 0x1 /* a proxy is at work there: what connects may end in the same namespace whatever its destination */

/* A network namespace whose sockets are considered. */
struct sa_space {
	__u32 client;   /* mask: classes whose clients its sockets may be */
	__u32 server;   /* mask: classes whose servers its sockets may be */
	__u32 endpoint; /* 0: the host */
	__u32 flags;    /* SA_SPACE_*; programs set them */
};

/* A listening port. */
struct sa_port {
	__u32 classes; /* mask: those that name it */
	__u32 proxy;   /* 1: proxies listen there */
};

/* What both ends of a connection know of it when it begins. */
struct sa_opening_key {
	struct fib_addr addr; /* client's */
	__u64 netns;          /* cookie, for loopback addresses; else 0 */
	__u32 client_seq;     /* the first of each: initial sequence number + 1 */
	__u32 server_seq;
	__u32 port;           /* client's */
	__u32 pad;
};
_Static_assert(sizeof(struct sa_opening_key) == 40, "ABI");

/* One end of a pair. */
struct sa_end {
	__u64 cookie;
	__u64 sock;           /* address in the kernel; 0: it is closed */
	__u64 netns;          /* cookie */
	struct fib_addr addr; /* its own */
	__u32 port;
	__u32 endpoint;       /* 0: the host */
	__u32 uid;
	__u32 mode;           /* enum sa_mode of what it sends */
	__u64 tcp_bytes;      /* sent the long way, since it has been a pair */
	__u64 tcp_sends;
	__u64 bytes;          /* handed over */
	__u64 sends;
	__u64 policy;         /* pol_ep.policy and revision it was proven under */
	__u32 policy_flags;
	__u32 reads;          /* process (thread group id) that has been seen to read plainly; 0: none */
	__u32 unread;         /* bytes handed to it since its queue was last seen empty, and SA_MESSAGE for each send: as much may wait there */
	__u32 settled;        /* 1: the pair has ended, and all that this end has handed over is in the other's queue, or read */
	__u64 task;           /* that hands over; an address in the kernel */
	__u32 tasks;          /* how often it has been another */
	__u32 judged;         /* times it was sent back to TCP */
	__u32 reader;         /* task (thread id) that has read last, SA_WAITS if its call waits; 0: none */
	__u32 stuck;          /* enum sa_stuck */
	__u32 seq;            /* tcp_sock.write_seq when it began to hand over */
	__u32 readers;        /* how often that has been another */
};
_Static_assert(sizeof(struct sa_end) == 144, "ABI");

/* A process that takes only what comes by TCP (it splices) while something that was handed to it waits. What is sent meanwhile waits behind
 * that, or is refused: by TCP it would be read first. */
enum sa_stuck {
	SA_FREE = 0,
	SA_STUCK = 1,
	SA_DOUBT = 2,     /* nothing has been seen to wait, but something may be on its way: the next send knows */
	SA_OVERTAKEN = 3, /* it has taken what was sent by TCP behind what waits: nothing is right any more */
};

enum sa_mode {
	SA_TCP = 0,
	SA_SHORT = 1,
};

/* Why a pair is no longer shortened, for good. As in fibril.sockaccel.v1.EndReason. */
enum sa_end_reason {
	SA_NOT_ENDED = 0,
	SA_CLOSED = 1,   /* the connection is */
	SA_BULK = 2,     /* one end sends much without a word of the other */
	SA_READS = 3,    /* recv() with flags that the short way does not know or that waits (sa_config.nonblocking), a process that splices, two at once */
	SA_SENDS = 4,    /* send() with such flags: urgent data, zero copy */
	SA_OPTION = 5,   /* SO_RCVLOWAT, a protocol on top (TLS) */
	SA_BEHIND = 6,   /* a reader that leaves more unread than one end may send without a word of the other */
};

/* A connection. */
struct sa_pair {
	struct sa_end ends[2]; /* the client's, the server's */
	__u64 made;            /* ns, CLOCK_MONOTONIC */
	__u64 beat;            /* of the last send over TCP while shortened */
	__u32 class;
	__u32 epoch;
	__u32 ended;           /* enum sa_end_reason */
	__u32 speaker;         /* who sent last */
	__u32 run;             /* bytes it has sent since the other spoke */
	__u32 proofs;          /* changes of speaker on TCP since it was judged */
	__u32 flags;           /* SA_PAIR_* */
	__u32 splicers;        /* element of sa_splicing when it was judged */
};
_Static_assert(sizeof(struct sa_pair) == 336, "ABI");

/* sa_pair.flags */
#define SA_PAIR_REDIRECTED 0x1 /* the client's destination is not the server's address */
#define SA_PAIR_OFF 0x4        /* switched off */

/* In the storage of each socket. */
struct sa_mine {
	__u64 pair; /* key of sa_pairs */
	__u32 side;  /* 0: the client's */
	__u32 reader; /* not 0: as in its end */
};

/* A program that has spliced: whose process that was, and its name. What is handed to its next process could be in the way of the first splice() again. */
struct sa_program {
	__u64 netns; /* cookie */
	__u32 uid;   /* as in its end */
	char name[16];
	__u32 pad;
};
_Static_assert(sizeof(struct sa_program) == 32, "ABI");

enum sa_event_kind {
	SA_EVENT_SHORT = 1, /* the first is handed over */
	SA_EVENT_ENDED = 2, /* of a pair; `pair.ended` has the reason */
	SA_EVENT_STUCK = 3, /* an end is: enum sa_stuck */
};

struct sa_event {
	__u64 time; /* ns, CLOCK_MONOTONIC */
	__u32 kind;
	__u32 pad;
	struct sa_pair pair;
};

/* Elements of sa_stats; metric labels are these in lower case. */
enum sa_stat {
	SA_STAT_PAIRS = 0,    /* made */
	SA_STAT_SHORTENED = 1, /* of which something was handed over */
	SA_STAT_BYTES = 2,    /* handed over */
	SA_STAT_SENDS = 3,
	SA_STAT_TCP_BYTES = 4, /* of pairs, over TCP */
	SA_STAT_TCP_SENDS = 5,
	SA_STAT_ALONE = 6,    /* clients whose server was not found here */
	SA_STAT_FULL = 7,     /* connections that found no room */
	SA_STAT_TAKEN = 8,    /* sockets that another program has */
	SA_STAT_LOST = 9,     /* events that found no room */
	SA_STAT_ENDED = 10,   /* + enum sa_end_reason: pairs that ended */
	SA_STATS = 24,
};

/* Socket cookie -> socket. */
BPF_SOCKHASH(sa_socks, __u64, 2 * SA_PAIRS_MAX);
/* Client's cookie -> connection. */
FIB_MAP("hash", __u64, struct sa_pair, sa_pairs, SA_PAIRS_MAX, BPF_F_NO_PREALLOC);
/* Of a socket in sa_socks. */
BPF_SK_STORAGE(sa_mine, struct sa_mine);
/* Clients whose server has not been met yet: ends[1] has whom they wanted, `class` the mask of classes they may be of. */
FIB_MAP("lru_hash", struct sa_opening_key, struct sa_pair, sa_opening, SA_OPENING_MAX, 0);
FIB_MAP("array", __u32, struct sa_config, sa_config, 1, 0);
/* Network namespace cookie -> its classes. */
FIB_MAP("hash", __u64, struct sa_space, sa_spaces, SA_SPACES_MAX, BPF_F_NO_PREALLOC);
FIB_MAP("hash", __u32, struct sa_port, sa_ports, 65536, BPF_F_NO_PREALLOC);
/* Users proxies run as. */
FIB_MAP("hash", __u32, __u32, sa_uids, 1024, BPF_F_NO_PREALLOC);
/* cgroup v2 id -> mask of classes. */
FIB_MAP("hash", __u64, __u32, sa_groups, 4096, BPF_F_NO_PREALLOC);
/* Addresses of the host. */
FIB_MAP("hash", struct fib_addr, __u32, sa_hosts, 4096, BPF_F_NO_PREALLOC);
/* Pairs (client's cookie) that are switched off. */
FIB_MAP("hash", __u64, __u32, sa_off, 65536, BPF_F_NO_PREALLOC);
/* Servers that wait in recv() (network namespace cookie << 16 | port), until somebody listens there anew: no pair is made for them where nobody is
 * to wait. */
FIB_MAP("lru_hash", __u64, __u32, sa_blocking, SA_BLOCKING_MAX, 0);
/* Processes (thread group id) that read otherwise than by recv() and read(): nothing is handed to them. */
FIB_MAP("lru_hash", __u32, __u32, sa_splicers, SA_SPLICERS_MAX, 0);
/* Programs whose processes have: their next are known before they read. */
FIB_MAP("lru_hash", struct sa_program, __u32, sa_programs, SA_SPLICERS_MAX, 0);
/* One element: how many have been found so far. Every pair is judged anew when it changes. */
FIB_MAP("array", __u32, __u32, sa_splicing, 1, 0);
FIB_MAP("percpu_array", __u32, __u64, sa_stats, SA_STATS, 0);
/* struct sa_event records. */
FIB_RINGBUF(sa_events, 1 << 20);
