/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Ports of the node that stand for clients towards a backend: as XDP takes them. A connection begins its search where its
 * hash says, so that what is lost of it is found again. XDP tries a few; tc searches all there are. */
#pragma once

#include "lb/flow.h"

#define XDP_NAT_TRIES 4

static __always_inline __u32 nat_range_size(__u32 range)
{
	return range ? (range & 0xffff) - (range >> 16) + 1 : 0;
}

/* Port number n of all there are, host order. */
static __always_inline __u32 nat_port(const struct lb_config *config, __u32 n)
{
	__u32 first = nat_range_size(config->snat_ports[0]);

	return n < first ? (config->snat_ports[0] >> 16) + n : (config->snat_ports[1] >> 16) + n - first;
}

/* Of a connection whose client has spoken more than once, or that is not TCP's. */
static __always_inline struct lb_nat *nat_settled(struct lb_tuple *key)
{
	__u32 index = 0;
	void *inner = lb_nats.lookup(&index);
	struct lb_nat *nat = inner ? bpf_map_lookup_elem_((uintptr_t)inner, key) : 0;

	if (likely(nat))
		return nat;
	index = 1;
	inner = lb_nats.lookup(&index);
	return inner ? bpf_map_lookup_elem_((uintptr_t)inner, key) : 0;
}

static __always_inline struct lb_nat *nat_find(struct lb_tuple *key)
{
	struct lb_nat *nat = nat_settled(key);

	return likely(nat) ? nat : lb_nats_new.lookup(key);
}

/* Whether a translation is of a connection that has only said SYN, or then at once that it is over. */
static __always_inline bool nat_is_new(const struct lb_nat *nat)
{
	return nat->stamp & LB_FLOW_TCP && (nat->stamp & (LB_FLOW_CONFIRMED | LB_FLOW_CLOSING)) != LB_FLOW_CONFIRMED;
}

/* Records it where it belongs; an error as of the kernel. */
static __always_inline long nat_put(struct lb_tuple *key, struct lb_nat *nat, __u64 how)
{
	__u32 zero = 0;
	void *inner;

	if (nat_is_new(nat))
		return how == BPF_NOEXIST ? lb_nats_new.insert(key, nat) : lb_nats_new.update(key, nat);
	inner = lb_nats.lookup(&zero);
	return inner ? bpf_map_update_elem_((uintptr_t)inner, key, nat, how) : -1;
}

/* What has been new until now. */
static __always_inline long nat_settle(struct lb_tuple *key, struct lb_nat *nat)
{
	long error = nat_put(key, nat, BPF_ANY);

	if (!error)
		lb_nats_new.delete(key);
	return error;
}

/* A settled one that is over. It would hide a new one from all who ask. */
static __always_inline void nat_unsettle(struct lb_tuple *key)
{
	for (__u32 index = 0; index < 2; index++) {
		__u32 which = index;
		void *inner = lb_nats.lookup(&which);

		if (inner)
			bpf_map_delete_elem_((uintptr_t)inner, key);
	}
}

static __always_inline bool nat_is_of(const struct lb_nat *nat, const struct lb_nat *wanted)
{
	return fib_addr_same(&nat->client, &wanted->client) && fib_addr_same(&nat->vip, &wanted->vip) &&
	       nat->cport == wanted->cport && nat->vport == wanted->vport;
}

/* Has the translation recorded under key->lport; false: another connection, not over yet, has that port. */
static __always_inline bool nat_record(const struct lb_config *config, struct lb_tuple *key, struct lb_nat *nat)
{
	struct lb_nat *other = nat_settled(key);
	bool settled = other;
	__u64 how = BPF_NOEXIST;
	__u32 stamp;

	if (!settled)
		other = lb_nats_new.lookup(key);
	if (other) {
		if (nat_is_of(other, nat)) {
			if (!settled && !nat_is_new(nat))
				return !nat_settle(key, nat);
			*(volatile __u16 *)&other->stamp = nat->stamp;
			return true;
		}
		/* Its stamp may say no more than the time. */
		stamp = other->stamp | LB_FLOW_CONFIRMED | (key->proto == IPPROTO_TCP ? LB_FLOW_TCP : 0);
		if (flow_alive(config, stamp, nat->stamp & LB_STAMP))
			return false;
		if (!settled && !nat_is_new(nat))
			return !nat_settle(key, nat);
		if (settled && nat_is_new(nat))
			nat_unsettle(key);
		else
			how = BPF_ANY;
	}
	return !nat_put(key, nat, how);
}

/* Takes a port for a new connection; it is key->lport then. */
static __always_inline bool nat_take(const struct lb_config *config, __u64 sig, struct lb_tuple *key, struct lb_nat *nat)
{
	__u32 count = nat_range_size(config->snat_ports[0]) + nat_range_size(config->snat_ports[1]);
	__u32 n = (sig & 0xffffffff) * count >> 32;

	for (int attempt = 0; attempt < XDP_NAT_TRIES && count; attempt++) {
		key->lport = bpf_htons(nat_port(config, n));
		if (nat_record(config, key, nat))
			return true;
		n = n + 1 < count ? n + 1 : 0;
	}
	return false;
}
