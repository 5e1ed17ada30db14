/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The host as an endpoint: what its processes send and get by the uplink. What they have to do with pods of this node is seen at the
 * pods' hooks, where decide.c asks the host's policy beside the pod's.
 *
 *   fib_policy_host_in    tc ingress of the uplink, after lb_uplink and from_uplink
 *   fib_policy_host_out   tc egress of the uplink, before lb_uplink_out
 *   fib_policy_host       slot POLICY_HOST: from the overlay, and to it
 *
 * While the host has no policy both let everything pass at once. What passes is not counted: it is the host's.
 */
#pragma once

#include "abi/endpoint.h"
#include "abi/ipcache.h"
#include "identity/overlay.h"
#include "identity/sender.h"
#include "identity/to_host.h"
#include "lib/parse.h"
#include "lib/router.h"
#include "lib/slot.h"
#include "lib/vlan.h"
#include "policy/decide.c"

#define PACKET_MULTICAST 2 /* skb->pkt_type: to the host, to all, to many; above: to nobody here */
#define HOST_TCP_LISTEN 10 /* bpf_sock.state */
#define HOST_SOCK_RAW 3    /* bpf_sock.type */

static __always_inline bool host_is_link_local(const struct fib_addr *addr, __u32 family)
{
	return family == 6 && (addr->w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* Multicast, broadcast of all networks. */
static __always_inline bool host_is_group(const struct fib_addr *addr, __u32 family)
{
	__u32 first = bpf_ntohl(family == 4 ? addr->w[3] : addr->w[0]);

	return family == 4 ? first >= 0xe0000000 : first >> 24 == 0xff;
}

static __always_inline bool host_is_own(struct fib_addr *addr, __u32 family)
{
	return ipcache_identity(addr) == IDENTITY_HOST || host_is_link_local(addr, family);
}

/* Whether the stack would keep the packet for itself. */
static __always_inline bool host_takes(struct __sk_buff *skb, const struct pkt_ctx *pkt)
{
	struct bpf_fib_lookup fib = { .ifindex = skb->ifindex, .family = pkt->family == 4 ? 2 : 10 };

	if (pkt->family == 4) {
		fib.ipv4_src = pkt->src.w[3];
		fib.ipv4_dst = pkt->dst.w[3];
	} else {
		__builtin_memcpy(fib.ipv6_src, &pkt->src, sizeof(pkt->src));
		__builtin_memcpy(fib.ipv6_dst, &pkt->dst, sizeof(pkt->dst));
	}
	switch (bpf_fib_lookup(skb, &fib, sizeof(fib), 0)) {
	case BPF_FIB_LKUP_RET_NOT_FWDED:
	case BPF_FIB_LKUP_RET_FWD_DISABLED:
		return true;
	}
	return false;
}

/* Parses the packet. False: it is none that anybody is asked about, or `*reason` to drop it. */
static __always_inline bool host_begin(struct __sk_buff *skb, struct pkt_ctx *pkt, __u32 direction, __u32 *reason)
{
	struct cursor at = parse_begin(skb);

	*reason = REASON_NONE;
	pkt->direction = direction;
	pkt->src_id = pkt->src_identity = pkt->src_flags = 0;
	pkt->dst_id = pkt->dst_identity = pkt->dst_flags = 0;
	pkt->dst_ifindex = 0;
	if (parse_eth(&at, skb, pkt) || pkt->flags & PKT_VLAN)
		return false;
	*reason = parse_ip(&at, skb, pkt);
	return !*reason && pkt->family;
}

static __always_inline int host_decide(struct __sk_buff *skb, struct pkt_ctx *pkt, __u32 end, __u32 host, bool through)
{
	struct pol_work *work = pol_work();

	if (work) {
		work->end = end;
		work->unrelated = 0;
		work->host = host;
		work->through = through;
		pol_tails.call(skb, POL_TAIL_DECIDE);
	}
	return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
}

int fib_policy_host_in(struct __sk_buff *skb)
{
	struct pol_config *config = pol_configuration();
	struct ct_entry *entry;
	bool direct, forward = false;
	struct pkt_ctx *pkt;
	enum vlan vlan;
	__u32 reason;

	if (likely(!ct_host()) || skb->pkt_type > PACKET_MULTICAST)
		return TC_ACT_UNSPEC;
	vlan = vlan_of(skb);
	if (unlikely(vlan != VLAN_NONE))
		return vlan == VLAN_OTHER ? TC_ACT_UNSPEC : vlan_drop(skb);
	pkt = slot_packet();
	if (!pkt || !config)
		return TC_ACT_SHOT;
	if (!host_begin(skb, pkt, DIR_FROM_UPLINK, &reason))
		return reason ? verdict_drop(skb, pkt, reason) : TC_ACT_UNSPEC;
	/* Frames to all or many are about all or many, unless the address is the host's: the stack looks at nothing else. */
	if (skb->pkt_type != PACKET_HOST && !host_is_own(&pkt->dst, pkt->family))
		return TC_ACT_UNSPEC;
	if (endpoint_by_address(&pkt->dst, pkt->family))
		return TC_ACT_UNSPEC;
	/* Whoever claims an address that does not come this way is nobody in particular. */
	if (sender_check(pkt, &direct))
		pkt->src_identity = IDENTITY_WORLD;
	pkt->dst_identity = IDENTITY_HOST;
	entry = ct_hit(config, pkt, &forward);
	if (likely(entry && ct_host_allows(entry, POL_INGRESS, forward)))
		return TC_ACT_UNSPEC;
	if (!host_is_own(&pkt->dst, pkt->family) && !host_takes(skb, pkt))
		return TC_ACT_UNSPEC;
	return host_decide(skb, pkt, POL_INGRESS, POL_HOST_UPLINK, false);
}

/* Whether a process of the host sends it. What is forwarded has no socket, unless it came straight from a pod: then it has the pod's, which
 * is bound to other ends. */
static __always_inline bool host_sends(struct __sk_buff *skb, const struct pkt_ctx *pkt)
{
	struct bpf_sock *sock = skb->sk;

	if (!sock)
		return false;
	sock = bpf_sk_fullsock(sock);
	if (!sock || sock->type == HOST_SOCK_RAW || (pkt->proto != IPPROTO_TCP && pkt->proto != IPPROTO_UDP) || pkt->flags & PKT_FRAG_LATER)
		return true;
	return sock->src_port == bpf_ntohs(pkt->sport);
}

/* What has no socket is forwarded. With an address of the host's it has been masqueraded: it is noted, so that what answers it is not
 * asked about either. */
int fib_policy_host_out(struct __sk_buff *skb)
{
	struct pol_config *config = pol_configuration();
	bool mine, forward = false;
	struct ct_entry *entry;
	struct pkt_ctx *pkt;
	__u32 reason;

	if (likely(!ct_host()) || skb->vlan_present)
		return TC_ACT_UNSPEC;
	pkt = slot_packet();
	if (!pkt || !config)
		return TC_ACT_SHOT;
	if (!host_begin(skb, pkt, DIR_FROM_HOST, &reason))
		return reason && skb->sk ? verdict_drop(skb, pkt, reason) : TC_ACT_UNSPEC;
	if (host_is_group(&pkt->dst, pkt->family) || endpoint_by_address(&pkt->src, pkt->family))
		return TC_ACT_UNSPEC;
	mine = host_sends(skb, pkt);
	if (!mine && !host_is_own(&pkt->src, pkt->family))
		return TC_ACT_UNSPEC;
	pkt->src_identity = IDENTITY_HOST;
	pkt->dst_identity = ipcache_identity(&pkt->dst);
	/* To all of its own network: what is the host's alone does not leave it. */
	if (pkt->dst_identity == IDENTITY_HOST)
		return TC_ACT_UNSPEC;
	entry = ct_hit(config, pkt, &forward);
	if (likely(entry && ct_host_allows(entry, POL_EGRESS, forward)))
		return TC_ACT_UNSPEC;
	return host_decide(skb, pkt, POL_EGRESS, POL_HOST_UPLINK, !mine);
}

/* Goes on where slot POLICY_HOST came in. */
static __always_inline int host_overlay(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct ipcache_entry *entry;
	struct node_entry *node;

	if (pkt->direction == DIR_FROM_OVERLAY)
		return overlay_to_host(skb, pkt);
	entry = ipcache_lookup(&pkt->dst);
	node = entry && entry->node ? node_by_index(entry->node) : 0;
	if (!node)
		return verdict_drop(skb, pkt, REASON_NODE_UNREACHABLE);
	/* What the host is to others. */
	pkt->src_identity = IDENTITY_REMOTE_NODE;
	return overlay_send(skb, pkt, node, pkt->src_identity);
}

int fib_policy_overlay(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();

	return pkt ? host_overlay(skb, pkt) : TC_ACT_SHOT;
}

int fib_policy_host(struct __sk_buff *skb)
{
	struct pol_config *config = pol_configuration();
	struct pkt_ctx *pkt = slot_packet();
	bool forward = false, in;
	struct ct_entry *entry;

	if (!pkt || !config)
		return TC_ACT_SHOT;
	if (likely(!ct_host()))
		return host_overlay(skb, pkt);
	in = pkt->direction == DIR_FROM_OVERLAY;
	if (in)
		pkt->dst_identity = IDENTITY_HOST;
	else
		pkt->src_identity = IDENTITY_HOST;
	entry = ct_hit(config, pkt, &forward);
	if (likely(entry && ct_host_allows(entry, in ? POL_INGRESS : POL_EGRESS, forward)))
		return host_overlay(skb, pkt);
	return host_decide(skb, pkt, in ? POL_INGRESS : POL_EGRESS, POL_HOST_OVERLAY, !in && !host_sends(skb, pkt));
}

/* A connection that this host has although nobody knows of it: it is older than the policy. It passes until it ends. */
static __always_inline bool host_has(struct __sk_buff *skb, const struct pkt_ctx *pkt, __u32 end)
{
	const struct fib_addr *here = end == POL_EGRESS ? ct_source(pkt) : &pkt->dst;
	const struct fib_addr *there = end == POL_EGRESS ? &pkt->dst : ct_source(pkt);
	__be16 hport = end == POL_EGRESS ? ct_source_port(pkt) : pkt->dport;
	__be16 tport = end == POL_EGRESS ? pkt->dport : ct_source_port(pkt);
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sock;
	__u32 size;
	bool has;

	if (pkt->family == 4) {
		tuple.ipv4.saddr = there->w[3];
		tuple.ipv4.daddr = here->w[3];
		tuple.ipv4.sport = tport;
		tuple.ipv4.dport = hport;
		sock = bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, there, sizeof(tuple.ipv6.saddr));
		__builtin_memcpy(tuple.ipv6.daddr, here, sizeof(tuple.ipv6.daddr));
		tuple.ipv6.sport = tport;
		tuple.ipv6.dport = hport;
		sock = bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sock)
		return false;
	has = sock->state != HOST_TCP_LISTEN;
	bpf_sk_release(sock);
	return has;
}

int fib_policy_older(struct __sk_buff *skb)
{
	struct pol_config *config = pol_configuration();
	struct pkt_ctx *pkt = slot_packet();
	struct pol_work *work = pol_work();
	struct ct_entry *entry;
	bool low;

	if (!pkt || !work || !config)
		return TC_ACT_SHOT;
	if (!host_has(skb, pkt, work->end)) {
		work->unrelated = 1;
		pol_tails.call(skb, POL_TAIL_DECIDE);
		return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
	}
	low = decide_key(skb, pkt, work);
	entry = ct_established(&work->key);
	if (!entry)
		entry = ct_new.lookup(&work->key);
	if (entry) {
		/* A pod's policy has noted it. */
		entry->flags |= CT_PASSES;
		return decide_let(skb, pkt, work);
	}
	__builtin_memset(&work->fresh, 0, sizeof(work->fresh));
	work->fresh.client = pkt->src_identity;
	work->fresh.server = pkt->dst_identity;
	work->fresh.seen = pol_beat(config);
	work->fresh.flags = decide_state(pkt, (low ? CT_CLIENT_LOW : 0) | CT_ANSWERED | CT_PASSES, true);
	decide_put(work, true);
	return decide_let(skb, pkt, work);
}
