/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `ipcache`, version 1: which identity an address has and behind which node it is.
 *
 * Written by the identity service (services/identity/ipcache/maps.py), read by programs of all services.
 * Single addresses, which are nearly all, are in a hash; prefixes, which are few, in a trie: a lookup in a
 * trie of many pods costs several times as much, and a single address is the longest prefix there is, so
 * asking the hash first gives the same answer.
 *
 * In front of both each CPU keeps what it has lately been told, for no longer than IPC_NEAR_JIFFIES: a hash costs a
 * packet 13 ns, a trie several times that, this 3. No writer needs to know, since an identity is published 300 ms
 * before it is used, and the one before is taken for seconds.
 */
#pragma once

#include "abi/addr.h"
#include "lib/likely.h"
#include "lib/maps.h"

/* Reserved identities that programs give (services/identity/numbers.py has all). */
#define IDENTITY_HOST 1
#define IDENTITY_WORLD 2
#define IDENTITY_INIT 5
#define IDENTITY_REMOTE_NODE 6
/* Identity numbers below this are reserved, those of the last cluster mean something on one node only. */
#define IDENTITY_CLUSTER_FIRST (1 << 20)
#define IDENTITY_LOCAL_FIRST (4095u << 20)

#define IPC_ADDR_MAX 524288
#define IPC_PREFIX_MAX 65536
#define IPC_NEAR_SLOTS 1024
/* How long an answer is used, at most; a power of two. 4 ms each on most kernels, 10 at most. */
#define IPC_NEAR_JIFFIES 4

/* ipcache_entry.flags */
#define IPC_SINGLE 0x1 /* one address (not only its prefix) is known: what a sender claims must fit it */

struct ipcache_entry {
	__u32 identity;     /* never 0 */
	__u32 before;       /* identity this address had until lately; 0: none */
	__u32 before_until; /* seconds of CLOCK_MONOTONIC until when a packet may carry `before` */
	__u16 node;         /* index into nd_nodes; 0: no node of the cluster */
	__u16 flags;        /* IPC_* */
};
_Static_assert(sizeof(struct ipcache_entry) == 16, "ABI");

struct ipcache_prefix {
	__u32 bits;     /* of the 128; an IPv4 prefix has 96 more than its length */
	__be32 addr[4]; /* as struct fib_addr, which would not be aligned here */
};
_Static_assert(sizeof(struct ipcache_prefix) == 20, "ABI");

/* An answer: identity 0 says that nothing is known of the address. */
struct ipcache_near {
	struct fib_addr addr;
	struct ipcache_entry entry;
	__u64 time; /* in units of IPC_NEAR_JIFFIES */
	__u64 pad[3];
};
_Static_assert(sizeof(struct ipcache_near) == 64, "ABI");

FIB_MAP("hash", struct fib_addr, struct ipcache_entry, ipc_addr, IPC_ADDR_MAX, BPF_F_NO_PREALLOC);
FIB_MAP("lpm_trie", struct ipcache_prefix, struct ipcache_entry, ipc_prefix, IPC_PREFIX_MAX, BPF_F_NO_PREALLOC);

FIB_MAP("percpu_array", __u32, struct ipcache_near, ipc_near, IPC_NEAR_SLOTS, 0);

/* The entry of the longest prefix that holds the address, or null. */
static __always_inline struct ipcache_entry *ipcache_ask(struct fib_addr *addr)
{
	struct ipcache_entry *entry = ipc_addr.lookup(addr);
	struct ipcache_prefix key;

	if (entry)
		return entry;
	key.bits = 128;
	__builtin_memcpy(key.addr, addr->w, sizeof(key.addr));
	return ipc_prefix.lookup(&key);
}

/* The same, mostly without asking; null is the world. Holds until the next call. For programs that nothing
 * interrupts on their CPU: tc, not cgroup hooks. */
static __always_inline struct ipcache_entry *ipcache_lookup(struct fib_addr *addr)
{
	__u32 low = bpf_ntohl(addr->w[3]), slot = (low ^ low >> 10) & (IPC_NEAR_SLOTS - 1);
	struct ipcache_near *near = ipc_near.lookup(&slot);
	__u64 now = bpf_jiffies64() / IPC_NEAR_JIFFIES;
	struct ipcache_entry *entry;

	if (!near)
		return 0;
	if (unlikely(near->time != now || !fib_addr_same(&near->addr, addr))) {
		entry = ipcache_ask(addr);
		near->time = now;
		near->addr = *addr;
		near->entry.identity = 0;
		if (entry)
			near->entry = *entry;
	}
	return near->entry.identity ? &near->entry : 0;
}

/* Identity of an address; the world's where nothing is known. */
static __always_inline __u32 ipcache_identity(struct fib_addr *addr)
{
	struct ipcache_entry *entry = ipcache_lookup(addr);

	return entry ? entry->identity : IDENTITY_WORLD;
}
