/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Clients outside, and answers to this node: tc ingress of the uplink, before from_uplink. What is no frontend's and no
 * answer is left to that and the host, uncounted.
 *
 * To a pod of this node the packet goes as it is but for its destination; to all other backends as this node's own, so
 * that they answer to it.
 */
#pragma once

#include "identity/sender.h"
#include "lb/dsr.h"
#include "lb/forward.h"
#include "lb/reverse.h"
#include "lb/route.h"
#include "lib/vlan.h"

/* Where the packet comes from and goes to, by the fixed headers alone. */
static __always_inline bool uplink_addresses(const struct cursor *at, struct fib_addr *src, struct fib_addr *dst, __u32 *family)
{
	void *ip = at->pos + ETH_HLEN;
	__be16 type;

	if (ip + sizeof(struct iphdr) > at->end)
		return false;
	type = ((const __be16 *)at->pos)[6];
	if (type == bpf_htons(ETH_P_IP)) {
		fib_addr_set_v4(src, ((struct iphdr *)ip)->saddr);
		fib_addr_set_v4(dst, ((struct iphdr *)ip)->daddr);
		*family = 4;
		return true;
	}
	if (type != bpf_htons(ETH_P_IPV6) || ip + sizeof(struct ipv6hdr) > at->end)
		return false;
	fib_addr_set_v6(src, ip + 8);
	fib_addr_set_v6(dst, ip + 24);
	*family = 6;
	return true;
}

static __always_inline bool uplink_hops_left(struct __sk_buff *skb, const struct pkt_ctx *pkt)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u8 *ip = data + ETH_HLEN;

	if ((void *)(ip + sizeof(struct iphdr)) > end)
		return false;
	return (pkt->family == 4 ? ip[8] : ip[7]) > 1;
}

/* The node behind which a backend is, where slot REMOTE knows the way to it. */
static __always_inline struct node_entry *uplink_node(struct fib_addr *backend)
{
	struct ipcache_entry *entry = ipcache_lookup(backend);
	struct node_entry *node = entry && entry->node ? node_by_index(entry->node) : 0;

	return node && node->mode != NODE_STACK && node->mode != NODE_LOCAL ? node : 0;
}

enum uplink_way {
	UPLINK_TO_POD,  /* of this node */
	UPLINK_TO_HOST, /* a process of this host: its answers pass fib_lb_uplink_out */
	UPLINK_TO_NODE, /* a pod of another node, by slot REMOTE */
	UPLINK_ROUTE,   /* whoever is behind one of the host's routes */
};

/* How the packet gets to its backend, which sees it come from `local`; elsewhere with so many bytes more. False: it does not, *action ends its way. */
static __always_inline bool uplink_choose(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct lb_config *config,
					  struct lb_backend *backend, const struct endpoint *pod, __u32 room,
					  struct fib_addr *local, struct route *route, enum uplink_way *how, int *action)
{
	__u8 proto = room ? dsr_proto(pkt->family) : pkt->proto;
	enum route_result found;
	struct node_entry *node;
	__u32 mtu = 0;

	*local = pkt->src;
	if (pod) {
		*how = UPLINK_TO_POD;
		mtu = router_too_big(skb, pkt, pod->mtu) ? pod->mtu : 0;
	} else if (backend->flags & LB_BE_LOCAL) {
		*how = UPLINK_TO_HOST;
	} else if (!forward_node(config, pkt->family, local)) {
		*action = verdict_drop(skb, pkt, REASON_LB_NO_ROUTE);
		return false;
	} else if ((node = uplink_node(&backend->addr))) {
		*how = UPLINK_TO_NODE;
		mtu = node->mtu && router_too_big(skb, pkt, node->mtu - room) ? node->mtu - room : 0;
	} else {
		*how = UPLINK_ROUTE;
		found = route_find(skb, pkt->family, local, &backend->addr, proto, route_len(skb, pkt) + room, route);
		if (found == ROUTE_TOO_BIG) {
			mtu = route->fib.mtu_result - room;
		} else if (found != ROUTE_OK) {
			*action = verdict_drop(skb, pkt, REASON_LB_NO_ROUTE);
			return false;
		}
	}
	if (likely(!mtu))
		return true;
	*action = forward_reject(skb, pkt, mtu);
	return false;
}

/* Whether the backend, unless it is here, gets the packet as it is: a connection goes on as it began. */
static __always_inline bool uplink_direct(const struct pkt_ctx *pkt, const struct lb_way *way)
{
	if (way->flow)
		return !way->state.port;
	return way->service->flags & (pkt->proto == IPPROTO_TCP ? LB_SVC_DSR : LB_SVC_DSR_UDP);
}

/* On its way out, translated or in a tunnel. */
static __always_inline int uplink_leave(struct __sk_buff *skb, struct pkt_ctx *pkt, enum uplink_way how, struct route *route)
{
	if (how == UPLINK_ROUTE)
		return route_leave(skb, pkt, route);
	pkt->src_identity = IDENTITY_REMOTE_NODE;
	pl_slots.call(skb, SLOT_REMOTE);
	return verdict_drop(skb, pkt, REASON_SLOT_MISSING);
}

static __always_inline int uplink_forward(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct lb_config *config,
					  struct lb_way *way)
{
	struct endpoint *pod = endpoint_by_address(&way->backend->addr, pkt->family);
	enum uplink_way how;
	struct fib_addr local;
	struct route route;
	__u32 nat = 0, room;
	bool direct;
	int action;

	/* The stack tells the client. */
	if (unlikely(!uplink_hops_left(skb, pkt)))
		return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
	direct = uplink_direct(pkt, way);
	room = direct ? dsr_room(pkt->family) : 0;
	if (unlikely(!uplink_choose(skb, pkt, config, way->backend, pod, room, &local, &route, &how, &action)))
		return action;
	if (direct && (how == UPLINK_TO_NODE || how == UPLINK_ROUTE)) {
		way_note(way, config);
		if (!dsr_encap(skb, pkt, &local, &way->backend->addr, way->port))
			return verdict_drop(skb, pkt, REASON_REDIRECT);
		return uplink_leave(skb, pkt, how, &route);
	}
	if (how != UPLINK_TO_HOST)
		nat = how == UPLINK_TO_POD ? LB_NAT_OUTSIDE : LB_NAT_OUTSIDE | LB_NAT_SNAT;
	if (!forward_record(skb, pkt, config, way, &local, nat, &action))
		return action;
	way_note(way, config);
	if (!forward_translate(skb, pkt, way, &local))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	if (how == UPLINK_TO_HOST)
		return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
	if (how == UPLINK_ROUTE)
		router_hop(skb, pkt);
	if (how != UPLINK_TO_POD)
		return uplink_leave(skb, pkt, how, &route);
	if (!pod || !router_prepare(skb, pkt, pod))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	return router_enter(skb, pkt);
}

/* Fills in what is known of the packet. False: it is not for us after all. */
static __always_inline bool uplink_begin(struct __sk_buff *skb, struct cursor *at, struct pkt_ctx *pkt)
{
	pkt->direction = DIR_FROM_UPLINK;
	pkt->src_id = pkt->src_identity = pkt->src_flags = 0;
	pkt->dst_id = pkt->dst_identity = pkt->dst_flags = 0;
	return !parse_eth(at, skb, pkt) && !parse_ip(at, skb, pkt) && pkt->family;
}

int fib_lb_uplink(struct __sk_buff *skb)
{
	struct lb_config *config = lb_configuration();
	struct fib_addr src, dst, node;
	struct lb_way way = {};
	bool answers, inside = false;
	__u32 to, family, reason;
	enum way_kind kind;
	struct pkt_ctx *pkt;
	struct lb_nat *nat;
	struct cursor at;

	if (skb->pkt_type != PACKET_HOST || !config || unlikely(vlan_of(skb) != VLAN_NONE))
		return TC_ACT_UNSPEC;
	at = parse_begin(skb);
	if (!uplink_addresses(&at, &src, &dst, &family))
		return TC_ACT_UNSPEC;
	to = lb_hint(&dst) & (LB_HINT_VIP | LB_HINT_RANGE | LB_HINT_NODE);
	answers = forward_node(config, family, &node) && fib_addr_same(&dst, &node);
	if (likely(!to && !answers))
		return TC_ACT_UNSPEC;
	pkt = slot_packet();
	if (!pkt || !uplink_begin(skb, &at, pkt))
		return TC_ACT_UNSPEC;
	if (unlikely(forward_is_error(pkt)))
		forward_leave(skb, LB_TAIL_ICMP, true);
	if (unlikely(!frag_ports(skb, pkt)))
		return to & LB_HINT_VIP ? verdict_drop(skb, pkt, REASON_LB_FRAGMENT) : TC_ACT_UNSPEC;
	if (answers && lb_hint(&src) & LB_HINT_BACKEND) {
		nat = reverse_find(pkt);
		if (nat && nat->flags & LB_NAT_OUTSIDE) {
			reverse_note(config, pkt, nat);
			return reverse_leave(skb, pkt, nat);
		}
	}
	if (!to)
		return TC_ACT_UNSPEC;
	reason = sender_check(pkt, &inside);
	if (unlikely(dsr_is_tunnel(pkt)) && lb_hint(&dst) & LB_HINT_BACKEND) {
		if (pkt->src_identity != IDENTITY_REMOTE_NODE)
			return verdict_drop(skb, pkt, REASON_LB_DSR_SOURCE);
		forward_leave(skb, LB_TAIL_DECAP, true);
	}
	kind = way_find(&way, config, pkt, to, !inside);
	if (kind == WAY_OTHER)
		return TC_ACT_UNSPEC;
	if (reason)
		return verdict_drop(skb, pkt, reason);
	if (kind != WAY_SERVED || !way.backend)
		return forward_refuse(skb, pkt, &way, kind);
	return uplink_forward(skb, pkt, config, &way);
}

/* What the host sends by the uplink: answers of its own processes. */
int fib_lb_uplink_out(struct __sk_buff *skb)
{
	struct cursor at = parse_begin(skb);
	struct lb_config *config = lb_configuration();
	struct fib_addr src, dst;
	struct pkt_ctx *pkt;
	struct lb_nat *nat;
	__u32 family;

	if (!config || !uplink_addresses(&at, &src, &dst, &family) || likely(!(lb_hint(&src) & LB_HINT_BACKEND)))
		return TC_ACT_UNSPEC;
	pkt = slot_packet();
	if (!pkt || !uplink_begin(skb, &at, pkt))
		return TC_ACT_UNSPEC;
	pkt->direction = DIR_FROM_HOST;
	if (unlikely(forward_is_error(pkt)))
		forward_leave(skb, LB_TAIL_ICMP, true);
	if (!frag_ports(skb, pkt))
		return TC_ACT_UNSPEC;
	nat = reverse_find(pkt);
	if (!nat || nat->flags)
		return TC_ACT_UNSPEC;
	reverse_note(config, pkt, nat);
	if (!reverse_translate(skb, pkt, nat))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	return verdict_pass(skb, pkt, VERDICT_TO_STACK, TC_ACT_UNSPEC);
}
