/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `endpoint`, version 1: the pod interfaces of this node. Written by the ipam service only. */
#pragma once

#include "abi/addr.h"
#include "lib/maps.h"

#define EP_MAX 65536

/* endpoint.flags */
#define EP_SHAPED_IN 0x1  /* the host side has a queueing discipline: deliver through it, not past it */
#define EP_SHAPED_OUT 0x2 /* the host side has an ingress qdisc: what passes the checks goes to the stack */

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
