/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* ICMP errors about translated packets. An error quotes the packet as whoever sends it saw it; whom it is for must see the
 * packet as he sent it himself.
 *
 *   about what a client sent:    quotes node or client -> backend; for the client
 *   about what a backend sent:   quotes VIP -> client; for the backend
 */
#pragma once

#include "lb/forward.h"
#include "lb/reverse.h"
#include "lb/route.h"
#include "lb/uplink.c"

#define ICMP_LEN 8

/* The quoted packet. */
struct icmp_quoted {
	struct ends ends;
	__u32 ip;
	__u32 l4;
	__u8 proto;
};

static __always_inline bool icmp_read_v4(struct __sk_buff *skb, struct icmp_quoted *quoted)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, quoted->ip, &ip, sizeof(ip)) || ip.version != 4 || ip.frag_off & bpf_htons(IP_FRAG_OFFSET))
		return false;
	fib_addr_set_v4(&quoted->ends.src, ip.saddr);
	fib_addr_set_v4(&quoted->ends.dst, ip.daddr);
	quoted->l4 = quoted->ip + ip.ihl * 4;
	quoted->proto = ip.protocol;
	return true;
}

static __always_inline bool icmp_read_v6(struct __sk_buff *skb, struct icmp_quoted *quoted)
{
	if (bpf_skb_load_bytes(skb, quoted->ip + 6, &quoted->proto, 1) ||
	    bpf_skb_load_bytes(skb, quoted->ip + 8, &quoted->ends, 2 * sizeof(struct fib_addr)))
		return false;
	quoted->l4 = quoted->ip + sizeof(struct ipv6hdr);
	return true;
}

static __always_inline bool icmp_read(struct __sk_buff *skb, const struct pkt_ctx *pkt, struct icmp_quoted *quoted)
{
	__be16 ports[2];

	quoted->ip = pkt->l4_off + ICMP_LEN;
	if (pkt->family == 4 ? !icmp_read_v4(skb, quoted) : !icmp_read_v6(skb, quoted))
		return false;
	if (quoted->proto != IPPROTO_TCP && quoted->proto != IPPROTO_UDP && quoted->proto != IPPROTO_SCTP)
		return false;
	if (bpf_skb_load_bytes(skb, quoted->l4, ports, sizeof(ports)))
		return false;
	quoted->ends.sport = ports[0];
	quoted->ends.dport = ports[1];
	return true;
}

/* Writes other ends into the quoted packet, its checksums and the error's. */
static __always_inline bool icmp_rewrite(struct __sk_buff *skb, const struct pkt_ctx *pkt, const struct icmp_quoted *quoted,
					 const struct ends *to)
{
	__u32 addresses = bpf_csum_diff((void *)&quoted->ends.src, 32, (void *)&to->src, 32, 0);
	__u32 before = (__u32)quoted->ends.dport << 16 | quoted->ends.sport, ports = (__u32)to->dport << 16 | to->sport;
	__u64 change = csum_change(before, ports), sum = 0;
	__be32 pair[2] = { to->src.w[3], to->dst.w[3] };
	__u16 check, fixed;
	__u32 at;

	if (pkt->family == 4) {
		/* The header's own checksum takes up what its addresses change. */
		if (bpf_skb_load_bytes(skb, quoted->ip + 10, &check, sizeof(check)))
			return false;
		check = csum_apply(check, addresses);
		if (bpf_skb_store_bytes(skb, quoted->ip + 10, &check, sizeof(check), 0) ||
		    bpf_skb_store_bytes(skb, quoted->ip + 12, pair, sizeof(pair), 0))
			return false;
	} else {
		sum += addresses;
		if (bpf_skb_store_bytes(skb, quoted->ip + 8, (void *)to, 2 * sizeof(struct fib_addr), 0))
			return false;
	}
	if (quoted->proto != IPPROTO_SCTP) {
		sum += change;
		if (bpf_skb_store_bytes(skb, quoted->l4, &ports, sizeof(ports), 0))
			return false;
		at = quoted->l4 + (quoted->proto == IPPROTO_TCP ? 16 : 6);
		/* Of TCP's header the checksum need not be quoted, and what is not there cannot be wrong. */
		if (!bpf_skb_load_bytes(skb, at, &check, sizeof(check)) && (check || quoted->proto == IPPROTO_TCP)) {
			fixed = csum_apply(check, change + addresses);
			if (bpf_skb_store_bytes(skb, at, &fixed, sizeof(fixed), 0))
				return false;
			sum += csum_change(check, fixed);
		}
	}
	return !bpf_l4_csum_replace(skb, pkt->l4_off + 2, 0, csum_fold(sum), 0);
}

/* About what a client sent. */
static __always_inline int icmp_to_client(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct icmp_quoted *quoted,
					  const struct lb_nat *nat)
{
	struct ends inside = { .src = nat->client, .dst = nat->vip, .sport = nat->cport, .dport = nat->vport };
	struct ends outer = { .src = pkt->src, .dst = nat->client };
	__u32 flags = nat->flags;
	struct route route;

	if (fib_addr_same(&pkt->src, &quoted->ends.dst) || flags & LB_NAT_SNAT)
		outer.src = nat->vip;
	if (flags & LB_NAT_OUTSIDE &&
	    (route_find(skb, pkt->family, &outer.src, &outer.dst, pkt->proto, skb->len - ETH_HLEN, &route) || !router_hop(skb, pkt)))
		return verdict_drop(skb, pkt, REASON_LB_NO_ROUTE);
	if (!icmp_rewrite(skb, pkt, quoted, &inside) || !translate(skb, pkt, &outer))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	if (flags & LB_NAT_OUTSIDE)
		return route_leave(skb, pkt, &route);
	if (pkt->direction == DIR_FROM_HOST)
		return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
	if (flags & LB_NAT_SNAT) {
		pkt->src_identity = IDENTITY_REMOTE_NODE;
		pl_slots.call(skb, SLOT_REMOTE);
		return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
	}
	return slot_after_lb(skb, pkt);
}

/* The connection whose answer is quoted, as its backend sees it; in work->key. `*nat` is its translation; null: the backend
 * answers directly, and has that itself. False: there is no connection. */
static __always_inline bool icmp_recall(struct pkt_ctx *pkt, const struct lb_config *config, struct lb_work *work,
					const struct icmp_quoted *quoted, struct lb_nat **nat)
{
	const struct ends *ends = &quoted->ends;
	__u64 sig = lb_hash(config, &ends->dst, ends->dport, &ends->src, ends->sport, quoted->proto);
	struct lb_front *front = lb_front_find(&ends->src, ends->sport, quoted->proto);
	union flow_state state = {};
	struct lb_backend *backend;

	*nat = 0;
	if (!flow_find(config, sig, flow_now(config), &state))
		return false;
	backend = lb_backend(state.backend);
	if (!backend)
		return false;
	__builtin_memset(&work->key, 0, sizeof(work->key));
	work->key.remote = backend->addr;
	work->key.rport = front && quoted->proto != IPPROTO_SCTP ? lb_front_port(front, backend, ends->sport) : backend->port;
	work->key.lport = state.port ? state.port : ends->dport;
	work->key.proto = quoted->proto;
	work->key.local = ends->dst;
	*nat = nat_find(&work->key);
	if (*nat)
		return true;
	if (!forward_node(config, pkt->family, &work->key.local))
		return false;
	if (!state.port)
		return !(backend->flags & LB_BE_LOCAL) && !endpoint_by_address(&backend->addr, pkt->family);
	*nat = nat_find(&work->key);
	return *nat;
}

/* To a backend that answers directly; work->key.local is this node. */
static __always_inline int icmp_direct(struct __sk_buff *skb, struct pkt_ctx *pkt, struct lb_work *work)
{
	struct lb_tuple *key = &work->key;
	enum uplink_way how = UPLINK_TO_NODE;
	struct route route;

	if (!uplink_node(&key->remote)) {
		how = UPLINK_ROUTE;
		if (route_find(skb, pkt->family, &key->local, &key->remote, dsr_proto(pkt->family),
			       skb->len - ETH_HLEN + dsr_room(pkt->family), &route))
			return verdict_drop(skb, pkt, REASON_LB_NO_ROUTE);
	}
	if (!dsr_encap(skb, pkt, &key->local, &key->remote, key->rport))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	return uplink_leave(skb, pkt, how, &route);
}

/* About what a backend sent: where that is, the error goes the way of its connection. */
static __always_inline int icmp_to_backend(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct icmp_quoted *quoted,
					   const struct lb_work *work, const struct lb_nat *nat)
{
	const struct lb_tuple *key = &work->key;
	struct ends inside = { .src = key->remote, .dst = key->local, .sport = key->rport, .dport = key->lport };
	struct ends outer = { .src = pkt->src, .dst = key->remote };
	bool snat = nat->flags & LB_NAT_SNAT;
	enum uplink_way how = UPLINK_TO_NODE;
	struct route route;

	if (!snat) {
		if (!icmp_rewrite(skb, pkt, quoted, &inside) || !translate(skb, pkt, &outer))
			return verdict_drop(skb, pkt, REASON_REDIRECT);
		return slot_after_lb(skb, pkt);
	}
	outer.src = key->local;
	if (!uplink_node(&outer.dst)) {
		how = UPLINK_ROUTE;
		if (route_find(skb, pkt->family, &outer.src, &outer.dst, pkt->proto, skb->len - ETH_HLEN, &route) ||
		    !router_hop(skb, pkt))
			return verdict_drop(skb, pkt, REASON_LB_NO_ROUTE);
	}
	if (!icmp_rewrite(skb, pkt, quoted, &inside) || !translate(skb, pkt, &outer))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	return uplink_leave(skb, pkt, how, &route);
}

/* Policy knows the connection that an error is about by its backend. */
static __always_inline void icmp_note(struct pkt_ctx *pkt, const struct icmp_quoted *quoted)
{
	__builtin_memcpy(pkt->room, &quoted->ends.dst, sizeof(quoted->ends.dst));
	pkt->room[4] = (__u32)quoted->ends.dport << 16 | quoted->ends.sport;
	pkt->flags |= PKT_QUOTED;
}

/* What it is none of goes on as it came. */
int fib_lb_icmp(struct __sk_buff *skb)
{
	struct lb_config *config = lb_configuration();
	struct pkt_ctx *pkt = slot_packet();
	struct lb_work *work = lb_work();
	struct icmp_quoted quoted = {};
	struct lb_nat *nat;

	if (!pkt || !work || !config)
		return TC_ACT_SHOT;
	if (icmp_read(skb, pkt, &quoted)) {
		__builtin_memset(&work->key, 0, sizeof(work->key));
		work->key.remote = quoted.ends.dst;
		work->key.local = quoted.ends.src;
		work->key.rport = quoted.ends.dport;
		work->key.lport = quoted.ends.sport;
		work->key.proto = quoted.proto;
		nat = nat_find(&work->key);
		if (nat) {
			icmp_note(pkt, &quoted);
			return icmp_to_client(skb, pkt, &quoted, nat);
		}
		if (icmp_recall(pkt, config, work, &quoted, &nat)) {
			if (nat)
				return icmp_to_backend(skb, pkt, &quoted, work, nat);
			if (work->uplink)
				return icmp_direct(skb, pkt, work);
		}
	}
	/* fib_from_uplink comes next, and counts. */
	if (work->uplink)
		return TC_ACT_UNSPEC;
	return slot_after_lb(skb, pkt);
}
