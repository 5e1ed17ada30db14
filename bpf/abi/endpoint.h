/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `endpoint`, version 1: the pod interfaces of this node.
 *
 * ep_iface and ep_addr hold the truth. A lookup in a hash costs a packet about 15 ns, in an array 2: so ep_near
 * stands in front of both: an array whose slots are given by the low bits of interface index or address,
 * which on a node are nearly consecutive. An element names its own keys. Where two pods would have one slot, one
 * of them is there and the slot is marked EP_CROWDED: then whoever finds another's there asks the hash, else
 * there is no such pod. So what is for other nodes or for the host costs no hash either. The mark is set before
 * the hash is written; a slot is never changed from one pod to another without being empty in between. User
 * space writes all three through services/common/pipeline/endpoints.py, programs read through the two functions
 * below.
 */
#pragma once

#include "abi/addr.h"
#include "lib/likely.h"
#include "lib/maps.h"

#define EP_MAX 65536

/* Slots of ep_near: one region a kind of key. */
#define EP_NEAR_SLOTS 4096
#define EP_NEAR_IFACE 0
#define EP_NEAR_V4 EP_NEAR_SLOTS
#define EP_NEAR_V6 (2 * EP_NEAR_SLOTS)

/* endpoint.flags */
#define EP_SHAPED_IN 0x1  /* the host side has a queueing discipline: deliver through it, not past it */
#define EP_SHAPED_OUT 0x2 /* the host side has an ingress qdisc: what passes the checks goes to the stack */

/* Only in ep_near, of the slot and not of the pod in it: the hash may have others that belong here. */
#define EP_CROWDED 0x80000000

/* A pod's interface. One value holds all that any program needs of it, so it costs one lookup a side. */
struct endpoint {
	struct fib_addr v6; /* zero: none */
	__be32 v4;          /* zero: none */
	__u32 id;           /* 1 to 65,535; host order, as all below */
	__u32 ifindex;      /* host side of the veth pair */
	__u32 identity;     /* zero: not known yet */
	__u32 flags;        /* EP_* */
	__u8 host_mac[6];   /* these two in the order of an Ethernet header the pod sends */
	__u8 pod_mac[6];
	__u16 mtu;          /* bytes, Ethernet header not counted */
	__u16 pad;
	__u32 reserved[3];  /* zero */
};
_Static_assert(sizeof(struct endpoint) == 64, "ABI");
_Static_assert(__builtin_offsetof(struct endpoint, pod_mac) == __builtin_offsetof(struct endpoint, host_mac) + 6, "ABI");

/* Host-side interface index -> endpoint: who is at the other end of this veth. */
FIB_MAP("hash", __u32, struct endpoint, ep_iface, EP_MAX, BPF_F_NO_PREALLOC);
/* Address -> endpoint: is the destination a pod of this node. Two entries for a dual-stack pod. */
FIB_MAP("hash", struct fib_addr, struct endpoint, ep_addr, 2 * EP_MAX, BPF_F_NO_PREALLOC);
/* Network namespace cookie -> endpoint id, for programs that see a socket. */
FIB_MAP("hash", __u64, __u32, ep_netns, EP_MAX, BPF_F_NO_PREALLOC);
/* cgroup v2 id -> endpoint id, for programs that see a process. */
FIB_MAP("hash", __u64, __u32, ep_cgroup, EP_MAX, BPF_F_NO_PREALLOC);
/* What the two above hold, as far as their slots are not taken by others. */
FIB_MAP("array", __u32, struct endpoint, ep_near, 3 * EP_NEAR_SLOTS, 0);

/* The pod behind the host-side interface, or null. */
static __always_inline struct endpoint *endpoint_by_ifindex(__u32 ifindex)
{
	__u32 slot = EP_NEAR_IFACE + (ifindex & (EP_NEAR_SLOTS - 1));
	struct endpoint *pod = ep_near.lookup(&slot);

	if (likely(pod && pod->ifindex == ifindex))
		return pod;
	/* Only moments of a pod's beginning and end get here: nothing to save. */
	return ep_iface.lookup(&ifindex);
}

/* The pod of this node that has the address, or null. */
static __always_inline struct endpoint *endpoint_by_address(struct fib_addr *addr, __u32 family)
{
	__u32 slot = (family == 4 ? EP_NEAR_V4 : EP_NEAR_V6) + (bpf_ntohl(addr->w[3]) & (EP_NEAR_SLOTS - 1));
	struct endpoint *pod = ep_near.lookup(&slot);

	if (!pod)
		return 0;
	/* An empty slot has the unspecified address, but no id. */
	if (pod->id && (family == 4 ? pod->v4 == addr->w[3] : fib_addr_same(&pod->v6, addr)))
		return pod;
	if (likely(!(pod->flags & EP_CROWDED)))
		return 0;
	return ep_addr.lookup(addr);
}
