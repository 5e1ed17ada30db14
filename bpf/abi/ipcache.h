/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Map family `ipcache`, version 1: which identity an address has and behind which node it is.
 *
 * Written by the identity service (services/identity/ipcache/maps.py), read by programs of all services.
 * Single addresses, which are nearly all, are in a hash; prefixes, which are few, in a trie: a lookup in a
 * trie of many pods costs several times as much, and a single address is the longest prefix there is, so
 * asking the hash first gives the same answer.
 */
#pragma once

#include "abi/addr.h"
#include "lib/maps.h"

/* Reserved identities that programs give (services/identity/numbers.py has all). */
#define IDENTITY_WORLD 2
#define IDENTITY_INIT 5
#define IDENTITY_REMOTE_NODE 6
/* Identity numbers below this are reserved, those of the last cluster mean something on one node only. */
#define IDENTITY_CLUSTER_FIRST (1 << 20)
#define IDENTITY_LOCAL_FIRST (4095u << 20)

#define IPC_ADDR_MAX 524288
#define IPC_PREFIX_MAX 65536

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

FIB_MAP("hash", struct fib_addr, struct ipcache_entry, ipc_addr, IPC_ADDR_MAX, BPF_F_NO_PREALLOC);
FIB_MAP("lpm_trie", struct ipcache_prefix, struct ipcache_entry, ipc_prefix, IPC_PREFIX_MAX, BPF_F_NO_PREALLOC);

/* The entry of the longest prefix that holds the address, or null: the world. */
static __always_inline struct ipcache_entry *ipcache_lookup(struct fib_addr *addr)
{
	struct ipcache_entry *entry = ipc_addr.lookup(addr);
	struct ipcache_prefix key;

	if (entry)
		return entry;
	key.bits = 128;
	__builtin_memcpy(key.addr, addr->w, sizeof(key.addr));
	return ipc_prefix.lookup(&key);
}

/* Identity of an address; the world's where nothing is known. */
static __always_inline __u32 ipcache_identity(struct fib_addr *addr)
{
	struct ipcache_entry *entry = ipcache_lookup(addr);

	return entry ? entry->identity : IDENTITY_WORLD;
}
