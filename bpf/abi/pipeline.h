/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `pipeline`, version 1: what the programs of all services share.
 *
 * A packet is parsed once into struct pkt_ctx and passes through slots of the program array:
 *
 *   from_pod: [LB] -> [POLICY_EGRESS] -> FORWARD -> [POLICY_INGRESS] -> DELIVER
 *   to_pod:   [LB] -> [POLICY_INGRESS]
 *   from_overlay: [LB -> FROM_OVERLAY] -> [POLICY_INGRESS] -> DELIVER
 *   from_uplink:  [LB -> FORWARD] -> [POLICY_INGRESS] -> DELIVER
 *   from_overlay to the host, from_host: [POLICY_HOST]
 *
 * A slot program ends with one of slot.h's or verdict.h's functions. An empty slot in brackets is skipped.
 * Changing pkt_ctx or what a slot may rely on means a new version of the family, so that programs of two
 * versions never call each other.
 */
#pragma once

#include "abi/addr.h"
#include "abi/event.h"
#include "abi/reasons.h"
#include "lib/maps.h"

/* A slot belongs to one service, which alone installs and removes it. */
enum slot {
	SLOT_LB = 0,
	SLOT_POLICY_EGRESS = 1,
	SLOT_FORWARD = 2,
	SLOT_POLICY_INGRESS = 3,
	SLOT_DELIVER = 4,
	SLOT_NEIGHBOUR = 5, /* ARP and neighbour discovery from a pod */
	SLOT_REMOTE = 6,    /* what is for no pod of this node; empty: the host's stack */
	SLOT_FROM_OVERLAY = 7, /* the rest of from_overlay, behind LB */
	SLOT_LB_ANSWER = 8, /* LB's part for answers of pods, behind POLICY_EGRESS */
	SLOT_POLICY_HOST = 9, /* between the overlay and the host itself, both ways */
	SLOT_COUNT = 16,
};

enum direction {
	DIR_FROM_POD = 1, /* as in fibril.monitor.v1.Direction */
	DIR_TO_POD = 2,
	DIR_FROM_OVERLAY = 3,
	DIR_FROM_UPLINK = 4,
	DIR_FROM_HOST = 5,
	DIR_COUNT = 8,
};

/* pkt_ctx.flags */
#define PKT_FRAG_FIRST 0x1 /* first fragment: ports are known */
#define PKT_FRAG_LATER 0x2 /* any other: ports are 0 */
#define PKT_TRANSLATED 0x4 /* orig_dst and orig_dport hold what the packet was sent to */
#define PKT_VLAN 0x8       /* tagged; no slot ever sees such a packet */
#define PKT_ANSWERS 0x10   /* of a service's backend; SLOT_LB_ANSWER is to give it the service's address */
#define PKT_ANSWER 0x20    /* that has been done: orig_dst and orig_dport hold what the packet came from */
#define PKT_QUOTED 0x40    /* an error quotes a service's address; room has its backend's (4 words) and both ports, the client's first */

/* What is known of the packet being handled. Holds for one packet on one CPU from entry to verdict: bottom
 * halves are off in tc, so nothing comes between. Whoever rewrites the packet keeps this in step. */
struct pkt_ctx {
	struct fib_addr src;
	struct fib_addr dst;
	struct fib_addr orig_dst; /* only with PKT_TRANSLATED or PKT_ANSWER */
	__u32 src_id;             /* endpoint ids; 0: none on this node, or not looked up yet */
	__u32 dst_id;
	__u32 src_identity;       /* 0: not known */
	__u32 dst_identity;
	__u32 src_flags;          /* EP_* of the source endpoint */
	__u32 dst_flags;          /* EP_* of the destination endpoint */
	__u32 dst_ifindex;        /* host side of the destination's veth */
	__u32 flags;              /* PKT_* */
	__be16 sport;             /* 0 where the protocol has no ports */
	__be16 dport;
	__be16 orig_dport;        /* as orig_dst */
	__be16 ethertype;         /* of the network header, behind VLAN tags */
	__u16 l4_off;             /* bytes from the start of the frame to the transport header */
	__u8 l4_len;              /* bytes of the TCP or UDP header, else 0 */
	__u8 family;              /* 4, 6, or 0: not IP */
	__u8 proto;               /* transport protocol, behind IPv6 extension headers */
	__u8 tcp_flags;
	__u8 icmp_type;           /* ICMP and ICMPv6 */
	__u8 icmp_code;
	__u8 direction;           /* enum direction */
	__u8 pad[7];
	__u32 room[8];            /* for services' own slots to tell each other; not cleared between packets */
};
_Static_assert(sizeof(struct pkt_ctx) == 136, "ABI");

/* Options of the node that programs read. All zero is the default. */
struct node_config {
	__u32 watch_drops;   /* 1: report every drop */
	__u32 watch_forward; /* 0: off; N: report one in N of the packets not dropped */
	__u32 reserved[6];
};
_Static_assert(sizeof(struct node_config) == 32, "ABI");

/* A super-packet (GSO) counts as one. */
struct pl_counter {
	__u64 packets;
	__u64 bytes; /* Ethernet header included */
};

/* Programs by slot. tc programs only; XDP gets its own array. Since Linux 6.12 all programs of an array
 * must be loaded with one expected attach type: ours have none, which serves ingress and egress. */
FIB_MAP("prog", __u32, __u32, pl_slots, SLOT_COUNT, 0);
/* The packet being handled on this CPU. */
FIB_MAP("percpu_array", __u32, struct pkt_ctx, pl_ctx, 1, 0);
FIB_MAP("array", __u32, struct node_config, pl_config, 1, 0);
/* Packets by reason * DIR_COUNT + direction; reason 0 counts those not dropped. */
FIB_MAP("percpu_array", __u32, struct pl_counter, pl_counters, REASON_COUNT * DIR_COUNT, 0);
/* struct event records. Empty unless node_config asks for them. */
FIB_RINGBUF(pl_events, 1 << 20);
