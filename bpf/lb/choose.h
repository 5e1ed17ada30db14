/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Which backend a new connection gets: for programs of all hooks. services/lb/choose.py is the same for people. */
#pragma once

#include "abi/lb.h"

/* A slot may be empty for the moment between two stores of user space: then the next one is taken. */
#define CHOOSE_TRIES 4

static __always_inline struct lb_stretch choose_stretch(const struct lb_service *service, bool outside)
{
	union {
		__u64 word;
		struct lb_stretch stretch;
	} read;

	read.word = *(volatile __u64 *)(outside ? &service->outside : &service->inside);
	return read.stretch;
}

/* Whether a service admits a client from outside. */
static __always_inline bool choose_admits(const struct lb_service *service, __u32 index, const struct fib_addr *client)
{
	struct lb_source_key key = { .bits = 160, .service = bpf_htonl(index) };

	if (likely(!(service->flags & LB_SVC_SOURCES)))
		return true;
	__builtin_memcpy(key.addr, client->w, sizeof(key.addr));
	return lb_sources.lookup(&key);
}

/* By 32 random or hashed bits; null: the service has no backend. */
static __always_inline struct lb_backend *choose_slot(struct lb_stretch stretch, __u32 bits)
{
	__u32 slot = lb_stretch_slot(&stretch, bits);
	struct lb_backend *backend;

	if (!stretch.count)
		return 0;
#pragma unroll
	for (int attempt = 0; attempt < CHOOSE_TRIES; attempt++) {
		backend = lb_backend(lb_slot(slot));
		if (likely(backend))
			return backend;
		slot = slot + 1 < stretch.first + stretch.count ? slot + 1 : stretch.first;
	}
	return 0;
}

/* The backend a client has had lately, as long as it takes new connections; null if none. */
static __always_inline struct lb_backend *choose_sticky(const struct lb_service *service, struct lb_client *client, __u32 beat)
{
	struct lb_sticky *sticky = lb_affinity.lookup(client);
	struct lb_backend *backend;

	if (!sticky || beat - sticky->beat > service->affinity_s)
		return 0;
	backend = lb_backend(sticky->backend);
	if (!backend || backend->state != LB_BE_ACTIVE || backend->service != client->service)
		return 0;
	sticky->beat = beat;
	return backend;
}

/* For a new connection of `client` (its address, or its namespace's cookie), whose lb_hash is `hash`. */
static __always_inline struct lb_backend *choose_backend(const struct lb_config *config, struct lb_service *service, __u32 index,
							 bool outside, const struct fib_addr *client, __u64 hash)
{
	struct lb_stretch stretch = choose_stretch(service, outside);
	bool affine = service->flags & LB_SVC_AFFINITY;
	struct lb_backend *backend;
	struct lb_client who = {};
	struct lb_sticky sticky;
	__u32 bits;

	if (unlikely(affine)) {
		who.addr = *client;
		who.service = index;
		sticky.beat = lb_beat(config);
		backend = choose_sticky(service, &who, sticky.beat);
		if (backend)
			return backend;
	}
	bits = service->flags & LB_SVC_MAGLEV ? hash >> 32 : bpf_get_prandom_u32();
	backend = choose_slot(stretch, bits);
	if (unlikely(affine) && backend) {
		sticky.backend = backend->id;
		lb_affinity.update(&who, &sticky);
	}
	if (backend)
		__sync_fetch_and_add(&service->connections, 1);
	return backend;
}
