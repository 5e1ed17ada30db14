/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Connections: found by both ends in either order, alive for as long as their state says. */
#pragma once

#include <uapi/linux/in.h>
#include "abi/pipeline.h"
#include "abi/policy.h"

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* Where the packet came from before the balancer gave it the service's address: connections are known by their backends. */
static __always_inline const struct fib_addr *ct_source(const struct pkt_ctx *pkt)
{
	return unlikely(pkt->flags & PKT_ANSWER) ? &pkt->orig_dst : &pkt->src;
}

static __always_inline __be16 ct_source_port(const struct pkt_ctx *pkt)
{
	return unlikely(pkt->flags & PKT_ANSWER) ? pkt->orig_dport : pkt->sport;
}

/* The key of the connection between two ends; whether the first one is the lower. */
static __always_inline bool ct_make_key(struct ct_key *key, const struct fib_addr *src, const struct fib_addr *dst, __be16 sport,
					__be16 dport, __u8 proto)
{
	bool low = src->q[1] != dst->q[1] ? src->q[1] < dst->q[1] : src->q[0] < dst->q[0];

	if (low) {
		key->low = *src;
		key->high = *dst;
		key->low_port = sport;
		key->high_port = dport;
	} else {
		key->low = *dst;
		key->high = *src;
		key->low_port = dport;
		key->high_port = sport;
	}
	/* With its padding. */
	*(__u32 *)&key->proto = proto;
	return low;
}

#define CT_ICMP4_REQUEST 8
#define CT_ICMP6_REQUEST 128

enum ct_icmp {
	CT_ICMP_OTHER,
	CT_ICMP_REQUEST, /* of an echo */
	CT_ICMP_ANSWER,
};

static __always_inline bool ct_is_icmp(__u8 proto)
{
	return proto == IPPROTO_ICMP || proto == IPPROTO_ICMPV6;
}

static __always_inline enum ct_icmp ct_icmp_kind(__u8 proto, __u8 type)
{
	if (type == (proto == IPPROTO_ICMP ? CT_ICMP4_REQUEST : CT_ICMP6_REQUEST))
		return CT_ICMP_REQUEST;
	return type == (proto == IPPROTO_ICMP ? 0 : CT_ICMP6_REQUEST + 1) ? CT_ICMP_ANSWER : CT_ICMP_OTHER;
}

/* What stands for ports of a message, `id` in network order. */
static __always_inline void ct_icmp_ports(__u8 proto, __u8 type, __be16 id, __be16 *sport, __be16 *dport)
{
	enum ct_icmp kind = ct_icmp_kind(proto, type);

	if (kind == CT_ICMP_OTHER) {
		*sport = bpf_htons(type);
		*dport = 0;
	} else {
		*sport = kind == CT_ICMP_REQUEST ? id : CT_ECHO;
		*dport = kind == CT_ICMP_REQUEST ? CT_ECHO : id;
	}
}

static __always_inline void *ct_table(void)
{
	__u32 zero = 0;

	return ct_flows.lookup(&zero);
}

/* An established connection; it may be over. */
static __always_inline struct ct_entry *ct_established(struct ct_key *key)
{
	void *table = ct_table();

	return table ? bpf_map_lookup_elem_((uintptr_t)table, key) : 0;
}

/* After how many beats of silence it is over. */
static __always_inline __u32 ct_limit(const struct pol_config *config, const struct ct_entry *entry, __u8 proto)
{
	__u32 both = CT_CLIENT_FIN | CT_SERVER_FIN;

	if (proto != IPPROTO_TCP)
		return entry->flags & CT_PASSES && config->any_s > CT_PASSES_S ? CT_PASSES_S : config->any_s;
	if (entry->flags & CT_RESET || (entry->flags & both) == both)
		return config->close_s;
	return entry->flags & CT_ANSWERED ? config->tcp_s : config->syn_s;
}

static __always_inline bool ct_alive(const struct pol_config *config, const struct ct_entry *entry, __u8 proto, __u32 now)
{
	/* Another CPU may have noted a packet of the next beat already. */
	return (__s32)(now - entry->seen) <= (__s32)ct_limit(config, entry, proto);
}

/* Whether the packet goes from who opened the connection to the other. `low`: its source is the lower end. */
static __always_inline bool ct_is_forward(const struct ct_entry *entry, bool low)
{
	return !!(entry->flags & CT_CLIENT_LOW) == low;
}

/* Whether it was made of the identities that the packet's ends have now. */
static __always_inline bool ct_same_identities(const struct ct_entry *entry, const struct pkt_ctx *pkt, bool forward)
{
	if (forward)
		return entry->client == pkt->src_identity && entry->server == pkt->dst_identity;
	return entry->client == pkt->dst_identity && entry->server == pkt->src_identity;
}

/* The policy that is concerned at the sender's end (POL_EGRESS) or the receiver's (POL_INGRESS) of a packet: who opened a connection was
 * asked on his way out, whoever he opened it to on its way in. */
static __always_inline __u32 ct_policy(__u32 end, bool forward)
{
	return forward ? end : !end;
}

/* The established connection that an ordinary packet belongs to, which is noted; null: more than this must be looked at. */
static __always_inline struct ct_entry *ct_hit(const struct pol_config *config, const struct pkt_ctx *pkt, bool *forward)
{
	struct ct_entry *entry;
	struct ct_key key;
	__u32 now;
	bool low;

	if (pkt->flags & (PKT_FRAG_FIRST | PKT_FRAG_LATER | PKT_ANSWER | PKT_ANSWERS))
		return 0;
	if (pkt->proto == IPPROTO_TCP ? pkt->tcp_flags & (TCP_FIN | TCP_SYN | TCP_RST) : pkt->proto != IPPROTO_UDP)
		return 0;
	low = ct_make_key(&key, &pkt->src, &pkt->dst, pkt->sport, pkt->dport, pkt->proto);
	entry = ct_established(&key);
	if (unlikely(!entry))
		return 0;
	*forward = ct_is_forward(entry, low);
	if (unlikely(!ct_same_identities(entry, pkt, *forward)))
		return 0;
	now = pol_beat(config);
	if (unlikely(entry->seen != now)) {
		if (!ct_alive(config, entry, pkt->proto, now))
			return 0;
		entry->seen = now;
	}
	return entry;
}

/* What is in force for an endpoint whose host side is `ifindex`; null: nothing is known, or it has switches to look at. */
static __always_inline const struct pol_ep *ct_endpoint(__u32 id, __u32 ifindex)
{
	struct pol_ep *ep = pol_eps.lookup(&id);

	return ep && likely(ep->owner == ifindex && ep->policy && !ep->flags) ? ep : 0;
}

/* What is in force for the host; null: nothing, all passes. */
static __always_inline const struct pol_ep *ct_host(void)
{
	__u32 zero = 0;
	struct pol_ep *ep = pol_eps.lookup(&zero);

	return ep && ep->policy ? ep : 0;
}

/* Whether the host, which is at this end of a packet, need not be asked about its connection. */
static __always_inline bool ct_host_allows(const struct ct_entry *entry, __u32 end, bool forward)
{
	const struct pol_ep *host = ct_host();

	if (likely(!host))
		return true;
	return !host->flags && (entry->flags & CT_PASSES || entry->revision[ct_policy(end, forward) & 1] == host->revision);
}
