/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What is remembered of sockets that speak to services (lb_socks, lb_socks_near), for recvmsg and getpeername: whom each has chosen, and whose
 * name answers bear.
 *
 * Entries of one socket are written by threads that share it without a lock: what they lose to each other is the answer to a
 * datagram under way, or a link of the chain of entries, whose rest services/lb/sockets/entries.py finds.
 */
#pragma once

#include "abi/lb.h"
#include "lb/choose.h"

#define FURTHER_MAX 1024 /* frontends that one unconnected socket gets answers from by their own names */

/* The backend of an entry, as long as it serves what it has. */
static __always_inline struct lb_backend *still_there(const struct lb_sock *entry, const struct lb_front *front)
{
	struct lb_backend *backend = lb_backend(entry->backend);

	if (!backend || backend->service != front->service)
		return 0;
	return backend->state == LB_BE_ACTIVE || backend->state == LB_BE_TERMINATING ? backend : 0;
}

static __always_inline bool leads_to(const struct lb_sock *entry, const struct fib_addr *addr, __be16 port)
{
	return entry->port == port && fib_addr_same(&entry->addr, addr);
}

static __always_inline bool is_for(const struct lb_sock *entry, const struct fib_addr *vip, __be16 vport)
{
	return entry->vport == vport && fib_addr_same(&entry->vip, vip);
}

/* Of an entry of kind LB_SOCK_OWN. */
static __always_inline bool has_further(const struct lb_sock *own)
{
	return own->flags & LB_SOCK_FURTHER;
}

static __always_inline void key_of(struct lb_sock_key *key, __u8 kind, const struct fib_addr *addr, __be16 port)
{
	key->kind = kind;
	key->addr = *addr;
	key->port = port;
}

static __always_inline struct lb_sock_near *near_of(__u64 cookie)
{
	__u32 slot = cookie & (LB_SOCK_NEAR - 1);

	return lb_socks_near.lookup(&slot);
}

static __always_inline void key_own(struct lb_sock_key *key)
{
	struct fib_addr none = {};

	key_of(key, LB_SOCK_OWN, &none, 0);
}

/* A socket's first entry, or null. `key` becomes its key. */
static __always_inline struct lb_sock *own_of(struct lb_sock_key *key)
{
	struct lb_sock_near *near = near_of(key->cookie);

	if (!near)
		return 0;
	if (near->cookie == key->cookie)
		return &near->entry;
	if (likely(!*(volatile __u32 *)&near->crowd))
		return 0;
	key_own(key);
	return lb_socks.lookup(key);
}

/* Whether a slot is taken, or entries that belong there are in the hash. */
static __always_inline bool near_busy(struct lb_sock_near *near)
{
	return *(volatile __u64 *)&near->claims; /* and near->crowd */
}

/* Have a free slot: whoever finds itself alone after it has come has it. */
static __always_inline bool near_claim(struct lb_sock_near *near)
{
	__sync_fetch_and_add(&near->claims, 1);
	if (likely(*(volatile __u32 *)&near->claims == 1))
		return true;
	__sync_fetch_and_add(&near->claims, -1);
	return false;
}

/* There is none yet: false if it could not be put anywhere, or another thread has just done so. */
static __always_inline bool own_put(struct lb_sock_key *key, struct lb_sock *entry)
{
	struct lb_sock_near *near = near_of(key->cookie);

	if (!near)
		return false;
	if (!*(volatile __u32 *)&near->claims && near_claim(near)) {
		near->entry = *entry;
		*(volatile __u64 *)&near->cookie = key->cookie;
		return true;
	}
	/* Counted first: who looks must not overlook it. */
	__sync_fetch_and_add(&near->crowd, 1);
	key_own(key);
	if (!lb_socks.insert(key, entry))
		return true;
	__sync_fetch_and_add(&near->crowd, -1);
	return false;
}

/* Over an entry that is there. Whoever reads it meanwhile sees no backend rather than another's address. */
static __always_inline void put_over(struct lb_sock *there, struct lb_sock *entry)
{
	__u32 backend = entry->backend;

	entry->flags |= there->flags & LB_SOCK_FURTHER;
	*(volatile __u32 *)&there->backend = 0;
	entry->backend = 0;
	__builtin_memcpy(there, entry, LB_SOCK_HOT);
	entry->backend = backend;
	*(volatile __u32 *)&there->backend = backend;
}

/* Answers of that backend are from the frontend last spoken to. */
static __always_inline void answers_from(struct lb_sock_key *key, struct lb_sock *entry, bool make)
{
	struct lb_sock *from;

	key_of(key, LB_SOCK_FROM, &entry->addr, entry->port);
	from = lb_socks.lookup(key);
	if (from) {
		if (!is_for(from, &entry->vip, entry->vport)) {
			from->vip = entry->vip;
			from->vport = entry->vport;
		}
	} else if (make && lb_socks.update(key, entry)) {
		lb_count(LB_STAT_SOCK_FULL);
	}
}

/* An unconnected socket speaks to one more frontend, or to the same one, whose backend has changed. */
static __always_inline void note_further(struct lb_sock_key *key, struct lb_sock *own, struct lb_sock *entry)
{
	struct lb_sock *to, *from;
	__u32 further;

	key_of(key, LB_SOCK_TO, &entry->vip, entry->vport);
	to = lb_socks.lookup(key);
	if (to) {
		key_of(key, LB_SOCK_FROM, &to->addr, to->port);
		from = lb_socks.lookup(key);
		if (from && is_for(from, &entry->vip, entry->vport))
			lb_socks.delete(key);
		put_over(to, entry);
	} else {
		further = has_further(own) ? own->further : 0;
		if (further) {
			entry->next = own->next;
			entry->nport = own->nport;
		}
		if (further >= FURTHER_MAX || lb_socks.update(key, entry)) {
			lb_count(LB_STAT_SOCK_FULL);
			return;
		}
		own->next = entry->vip;
		own->nport = entry->vport;
		own->further = further + 1;
		own->flags |= LB_SOCK_FURTHER;
	}
	answers_from(key, entry, true);
}

static __always_inline void note_slowly(struct lb_sock_key *key, const struct lb_sock *chosen)
{
	struct lb_sock entry = {}, *own;

	__builtin_memcpy(&entry, chosen, LB_SOCK_HOT);
	own = own_of(key);
	if (!own) {
		if (own_put(key, &entry))
			return;
		own = own_of(key);
		if (!own) {
			lb_count(LB_STAT_SOCK_FULL);
			return;
		}
	}
	if (entry.flags & LB_SOCK_CONNECTED || (!(own->flags & LB_SOCK_CONNECTED) && is_for(own, &entry.vip, entry.vport)))
		put_over(own, &entry);
	else
		note_further(key, own, &entry);
}

/* What has been chosen, as far as LB_SOCK_HOT, for recvmsg and getpeername. Without room the connection works all the same, under the
 * backend's name. */
static __always_inline void note(struct lb_sock_key *key, const struct lb_sock *chosen)
{
	struct lb_sock_near *near = near_of(key->cookie);

	/* Neither it nor another is there. */
	if (likely(near && !near_busy(near)) && likely(near_claim(near))) {
		__builtin_memcpy(&near->entry, chosen, LB_SOCK_HOT);
		*(volatile __u64 *)&near->cookie = key->cookie;
		return;
	}
	note_slowly(key, chosen);
}

/* Whether a socket goes on with its own entry. A connected one hears nobody else than its backend; but it may have been
 * disconnected again (connect() to AF_UNSPEC, which nobody tells), so that one which is gone is nobody to stay with. */
static __always_inline bool stays(const struct lb_sock *own, const struct lb_front *front)
{
	return own->flags & LB_SOCK_CONNECTED ? !!lb_backend(own->backend) : !!still_there(own, front);
}
