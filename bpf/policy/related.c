/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* ICMP errors: what is about a packet of a connection that policy allows passes, for it is part of that connection. All else is asked
 * about by its type, as any message. So are errors about connections that the present policy has not been asked about yet: the packet
 * that an honest one is about has passed here just before.
 *
 * Connections are known by their backends. Where LB has written the service's address into what an error quotes, it has left the
 * backend's in the context (PKT_QUOTED).
 */
#pragma once

#include "abi/endpoint.h"
#include "policy/decide.c"

#define RELATED_HEADER 8 /* of ICMP, before the quoted packet */

struct related_quote {
	struct fib_addr src;
	struct fib_addr dst;
	__be16 ports[2];
	__u32 l4;
	__u8 proto;
};

static __always_inline bool related_read_v4(struct __sk_buff *skb, __u32 at, struct related_quote *quote)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5 || ip.frag_off & bpf_htons(IP_FRAG_OFFSET))
		return false;
	fib_addr_set_v4(&quote->src, ip.saddr);
	fib_addr_set_v4(&quote->dst, ip.daddr);
	quote->proto = ip.protocol;
	quote->l4 = at + ip.ihl * 4;
	return quote->proto != IPPROTO_ICMPV6;
}

/* Of extension headers a fragment's alone is looked behind. */
static __always_inline bool related_read_v6(struct __sk_buff *skb, __u32 at, struct related_quote *quote)
{
	struct ipv6hdr ip;
	__u8 frag[4];

	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) || ip.version != 6)
		return false;
	fib_addr_set_v6(&quote->src, &ip.saddr);
	fib_addr_set_v6(&quote->dst, &ip.daddr);
	quote->proto = ip.nexthdr;
	quote->l4 = at + sizeof(ip);
	if (quote->proto == IPPROTO_FRAGMENT) {
		if (bpf_skb_load_bytes(skb, quote->l4, frag, sizeof(frag)) || frag[2] || frag[3] & 0xf8)
			return false;
		quote->proto = frag[0];
		quote->l4 += 8;
	}
	return quote->proto != IPPROTO_ICMP;
}

/* Ports of the quoted packet. */
static __always_inline bool related_read_ports(struct __sk_buff *skb, struct related_quote *quote)
{
	__be16 id = 0;
	__u8 type;

	quote->ports[0] = quote->ports[1] = 0;
	if (quote->proto == IPPROTO_TCP || quote->proto == IPPROTO_UDP || quote->proto == IPPROTO_UDPLITE || quote->proto == IPPROTO_SCTP)
		return !bpf_skb_load_bytes(skb, quote->l4, quote->ports, sizeof(quote->ports));
	if (!ct_is_icmp(quote->proto))
		return true;
	if (bpf_skb_load_bytes(skb, quote->l4, &type, 1) || bpf_skb_load_bytes(skb, quote->l4 + 4, &id, sizeof(id)))
		return false;
	ct_icmp_ports(quote->proto, type, id, &quote->ports[0], &quote->ports[1]);
	return true;
}

/* Whether the quoted packet is one that the error's receiver sent, and, on a pod's way out, one that this pod got. */
static __always_inline bool related_fits(struct __sk_buff *skb, const struct pkt_ctx *pkt, const struct pol_work *work,
					 const struct related_quote *quote)
{
	struct endpoint *pod;

	if (!fib_addr_same(&quote->src, &pkt->dst))
		return false;
	if (work->end != POL_EGRESS)
		return true;
	pod = endpoint_by_ifindex(skb->ifindex);
	if (!pod)
		return false;
	return pkt->family == 4 ? pod->v4 == quote->dst.w[3] : fib_addr_same(&pod->v6, &quote->dst);
}

static __always_inline bool related(struct __sk_buff *skb, const struct pol_config *config, struct pkt_ctx *pkt, struct pol_work *work)
{
	__u32 at = pkt->l4_off + RELATED_HEADER;
	__u32 id = work->end == POL_EGRESS ? pkt->src_id : pkt->dst_id, policy;
	struct related_quote quote = {};
	struct ct_entry *entry;
	bool low, forward;
	struct pol_ep *ep;

	if (pkt->family == 4 ? !related_read_v4(skb, at, &quote) : !related_read_v6(skb, at, &quote))
		return false;
	if (!related_read_ports(skb, &quote))
		return false;
	if (pkt->flags & PKT_QUOTED) {
		__builtin_memcpy(&quote.dst, pkt->room, sizeof(quote.dst));
		__builtin_memcpy(quote.ports, &pkt->room[4], sizeof(quote.ports));
	}
	if (!related_fits(skb, pkt, work, &quote))
		return false;
	low = ct_make_key(&work->key, &quote.src, &quote.dst, quote.ports[0], quote.ports[1], quote.proto);
	entry = ct_established(&work->key);
	if (!entry)
		entry = ct_new.lookup(&work->key);
	if (!entry || !ct_alive(config, entry, quote.proto, pol_beat(config)))
		return false;
	/* The error goes the other way. */
	forward = !ct_is_forward(entry, low);
	policy = ct_policy(work->end, forward) & 1;
	ep = pol_eps.lookup(&id);
	return ep && entry->revision[policy] == ep->revision && entry->flags & CT_ALLOWED << policy;
}

int fib_policy_related(struct __sk_buff *skb)
{
	struct pol_config *config = pol_configuration();
	struct pkt_ctx *pkt = slot_packet();
	struct pol_work *work = pol_work();

	if (!pkt || !work || !config)
		return TC_ACT_SHOT;
	if (related(skb, config, pkt, work)) {
		pol_count(POL_STAT_RELATED);
		return decide_pass(skb, pkt, work);
	}
	work->unrelated = 1;
	pol_tails.call(skb, POL_TAIL_DECIDE);
	return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
}
