/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `node`, version 1: the nodes of the cluster and how this one reaches them.
 *
 * Written by the identity service (services/identity/network/nodemap.py), read by its programs. ipcache entries
 * name a node by index, so a node that moves costs one write, however many pods it has.
 */
#pragma once

#include "abi/addr.h"
#include "lib/maps.h"

#define ND_MAX 16384

enum node_mode {
	NODE_NONE = 0,    /* not known, or has no address: nothing can be sent */
	NODE_LOCAL = 1,   /* this very node */
	NODE_OVERLAY = 2, /* VXLAN */
	NODE_ROUTED = 3,  /* on the same network: the node's address is the next hop */
	NODE_STACK = 4,   /* the host's routes know (cloud) */
};

/* node_entry.flags */
#define NODE_TUNNEL_V6 0x1 /* overlay packets travel in IPv6 */
#define NODE_HOP_V6 0x2    /* its IPv6 address is the next hop of IPv4 packets, too; NODE_ROUTED */
#define NODE_DIRECT 0x4    /* on the same IPv4 network: overlay packets need no route; NODE_OVERLAY */

struct node_entry {
	struct fib_addr v6; /* its underlay addresses; zero: none */
	__be32 v4;
	__u32 ifindex;      /* uplink towards it; NODE_ROUTED and NODE_DIRECT */
	__u16 mtu;          /* largest packet of a pod that fits, bytes, Ethernet header not counted */
	__u8 mode;          /* enum node_mode */
	__u8 flags;         /* NODE_* */
	__u32 pad;
};
_Static_assert(sizeof(struct node_entry) == 32, "ABI");

/* One element: what programs need of this node's network. Zero: there is no such device. */
struct network_config {
	__u32 overlay_ifindex; /* VXLAN device */
	__u32 host_ifindex;    /* fb<tag>host: the host's side towards pods */
	__u32 uplink_ifindex;
	__u8 host_mac[6];      /* of fb<tag>host: what is sent in by it must be addressed to it */
	__be16 overlay_port;   /* UDP */
	__be32 v4;             /* this node's underlay addresses, which peers know it by; zero: none */
	struct fib_addr v6;
	__u32 reserved[6];
};
_Static_assert(sizeof(struct network_config) == 64, "ABI");

FIB_MAP("array", __u32, struct node_entry, nd_nodes, ND_MAX, 0);
FIB_MAP("array", __u32, struct network_config, nd_config, 1, 0);

/* The node behind an ipcache entry; null only for an index no map has. */
static __always_inline struct node_entry *node_by_index(__u32 index)
{
	return nd_nodes.lookup(&index);
}
