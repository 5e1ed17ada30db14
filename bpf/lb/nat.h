/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Translations as their backends see them (lb_nats), and ports for new ones: all that there are, in an order that
 * is the connection's own. It begins as XDP does, so that either finds again what the other had. */
#pragma once

#include "lb/flow.h"
#include "lb/work.h"
#include "lb/xdp_nat.h"

#define NAT_EXIST (-17) /* EEXIST */

enum nat_result {
	NAT_OK = 0,
	NAT_TAKEN = 1, /* another connection has that port */
	NAT_FULL = 2,  /* the table takes no more */
};

static __always_inline void *nat_table(__u32 which)
{
	return lb_nats.lookup(&which);
}

/* Whether a translation may still be in use; XDP writes no more than the time into a stamp. */
static __always_inline bool nat_alive(const struct lb_config *config, const struct lb_nat *nat, __u8 proto, __u32 now)
{
	__u32 stamp = nat->stamp | LB_FLOW_CONFIRMED | (proto == IPPROTO_TCP ? LB_FLOW_TCP : 0);

	return flow_alive(config, stamp, now);
}

/* Has the translation recorded under its key. */
static __always_inline enum nat_result nat_write(const struct lb_config *config, struct lb_tuple *key, struct lb_nat *nat)
{
	__u32 now = nat->stamp & LB_STAMP;
	struct lb_nat *other = nat_settled(key);
	bool settled = other;
	__u64 how = BPF_NOEXIST;
	long error;

	if (!settled)
		other = lb_nats_new.lookup(key);
	if (other) {
		if (nat_is_of(other, nat)) {
			if (!settled && !nat_is_new(nat))
				return nat_settle(key, nat) ? NAT_FULL : NAT_OK;
			if (other->stamp != nat->stamp)
				*(volatile __u16 *)&other->stamp = nat->stamp;
			other->backend = nat->backend;
			other->flags = nat->flags;
			return NAT_OK;
		}
		if (nat_alive(config, other, key->proto, now))
			return NAT_TAKEN;
		if (!settled && !nat_is_new(nat))
			return nat_settle(key, nat) ? NAT_FULL : NAT_OK;
		if (settled && nat_is_new(nat))
			nat_unsettle(key);
		else
			how = BPF_ANY;
	}
	error = nat_put(key, nat, how);
	return likely(!error) ? NAT_OK : error == NAT_EXIST ? NAT_TAKEN : NAT_FULL;
}

static __always_inline __u32 nat_ports(const struct lb_config *config)
{
	return nat_range_size(config->snat_ports[0]) + nat_range_size(config->snat_ports[1]);
}

/* Where the search for a connection begins, of `count` ports. The upper half has chosen the backend. */
static __always_inline __u32 nat_first(__u64 sig, __u32 count)
{
	return (sig & 0xffffffff) * count >> 32;
}

/* The first few, in order. */
static __always_inline enum nat_result nat_begin(const struct lb_config *config, __u64 sig, struct lb_tuple *key,
						 struct lb_nat *nat)
{
	__u32 count = nat_ports(config), n = nat_first(sig, count);
	enum nat_result result = NAT_TAKEN;

	for (int attempt = 0; attempt < XDP_NAT_TRIES && count; attempt++) {
		key->lport = bpf_htons(nat_port(config, n));
		result = nat_write(config, key, nat);
		if (result != NAT_TAKEN)
			break;
		n = n + 1 < count ? n + 1 : 0;
	}
	return result;
}

static __always_inline void nat_full_key(struct lb_full_key *full, const struct lb_tuple *key)
{
	__builtin_memset(full, 0, sizeof(*full));
	full->addr = key->remote;
	full->port = key->rport;
	full->proto = key->proto;
}

/* Whether the search has just failed for that backend. Counts what is refused for it. */
static __always_inline bool nat_exhausted(const struct lb_config *config, const struct lb_tuple *key)
{
	struct lb_full_key which;
	struct lb_full *full;

	nat_full_key(&which, key);
	full = lb_exhausted.lookup(&which);
	if (!full || full->beat != lb_beat(config))
		return false;
	__sync_fetch_and_add(&full->times, 1);
	lb_count(LB_STAT_NO_PORT);
	return true;
}

static __always_inline void nat_exhaust(const struct lb_config *config, const struct lb_tuple *key)
{
	struct lb_full first = { .times = 1, .beat = lb_beat(config) };
	struct lb_full_key which;
	struct lb_full *full;

	lb_count(LB_STAT_NO_PORT);
	nat_full_key(&which, key);
	full = lb_exhausted.lookup(&which);
	if (!full) {
		lb_exhausted.update(&which, &first);
		return;
	}
	full->beat = first.beat;
	__sync_fetch_and_add(&full->times, 1);
}
