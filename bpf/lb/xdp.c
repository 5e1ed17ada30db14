/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The balancer's fast path, first thing on an uplink: TCP and UDP from clients outside to backends that are reached by
 * the network, and their answers.
 *
 * Only what is certain is done here. Whatever else a packet may need (fragments, ICMP, a pod of this node, the overlay, a
 * neighbour not yet resolved, an error to be sent, no backend, no port left) goes on to tc as it came, and tc decides the
 * same by the same tables.
 */
#include <uapi/linux/bpf.h>
#include "abi/lb.h"
#include "abi/xdp.h"
#include "lb/choose.h"
#include "lb/flow.h"
#include "lb/front.h"
#include "lb/prefilter.h"
#include "lb/xdp_packet.h"
#include "lb/xdp_route.h"
#include "lb/xdp_dsr.h"
#include "lb/xdp_front.h"
#include "lb/xdp_snat.h"

/* The frame's receiver if that is this machine; 0: another one's, or many. */
static __always_inline __u64 xdp_own_mac(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 zero = 0;
	struct lb_xdp *own = lb_xdp.lookup(&zero);
	__u64 mac;

	if (!own || data + ETH_HLEN > end)
		return 0;
	mac = *(__u64 *)data & XDP_MAC;
#pragma unroll
	for (int at = 0; at < LB_XDP_MACS; at++)
		if (mac == own->macs[at])
			return mac;
	return 0;
}

/* A packet on its way through. */
struct xdp_way {
	struct xdp_packet packet;
	struct lb_service *service;
	struct lb_backend *backend;
	struct lb_flow *line; /* where its connection is, or will be */
	struct lb_flow *flow; /* its connection; null: it begins with this packet */
	union flow_state state;
	__u64 sig;
	__u64 own; /* MAC of the device it came by */
	__u32 now;
	__be16 port; /* the backend's */
};

/* An established TCP connection needs no frontend: it goes on for as long as its backend is there. */
static __always_inline bool xdp_goes_on(struct xdp_way *way, __u32 hint)
{
	if (!way->backend || way->packet.proto != IPPROTO_TCP || way->packet.tcp_flags & XDP_SYN || hint & LB_HINT_RANGE)
		return false;
	way->service = lb_service(way->backend->service);
	way->port = way->backend->port;
	return way->service && !(way->service->flags & LB_SVC_SOURCES);
}

/* All other packets: which service, and unless they have one of its backends, which. */
static __always_inline bool xdp_serve(struct xdp_way *way, const struct lb_config *config, __u32 hint)
{
	const struct xdp_packet *packet = &way->packet;
	struct lb_front *front = xdp_front_find(config, hint, &packet->dst, packet->dport, packet->proto, way->now);
	__u64 hash = way->sig;

	if (!front)
		return false;
	way->service = lb_service(front->service);
	if (!way->service)
		return false;
	if (front->flags & LB_FRONT_OUTSIDE && !choose_admits(way->service, front->service, &packet->src))
		return false;
	if (!way->backend || way->backend->service != front->service) {
		/* A client with affinity is one, whatever port it speaks from. */
		if (unlikely(way->service->flags & LB_SVC_AFFINITY))
			hash = lb_hash(config, &packet->src, 0, &packet->dst, packet->dport, packet->proto);
		way->backend = choose_backend(config, way->service, front->service, front->flags & LB_FRONT_OUTSIDE,
					      &packet->src, hash);
		if (!way->backend)
			return false;
		if (way->flow)
			flow_forget(way->flow);
		way->flow = 0;
		way->state.word = way->backend->id;
	}
	way->port = lb_front_port(front, way->backend, packet->dport);
	return true;
}

/* The connection that the packet belongs to, if there is one and its backend is still there. */
static __always_inline bool xdp_recall(struct xdp_way *way, const struct lb_config *config)
{
	const struct xdp_packet *packet = &way->packet;
	struct lb_backend *backend;

	way->now = flow_now(config);
	way->sig = lb_hash(config, &packet->src, packet->sport, &packet->dst, packet->dport, packet->proto);
	way->line = flow_line(LB_FLOWS, config->flow_mask, way->sig);
	if (!way->line)
		return false;
	way->flow = flow_find_in(config, way->line, way->sig, way->now, &way->state);
	way->backend = 0;
	if (!way->flow || flow_begins(way->state.stamp, packet->proto, packet->tcp_flags))
		return true;
	backend = lb_backend(way->state.backend);
	/* One null check, not two that the verifier cannot connect. */
	FLOW_OPAQUE(backend);
	/* What is going away takes nothing new. */
	if (backend && !(packet->tcp_flags & XDP_SYN && backend->state != LB_BE_ACTIVE))
		way->backend = backend;
	return true;
}

/* Has the connection remembered. */
static __always_inline void xdp_note(struct xdp_way *way, const struct lb_config *config, __u32 stamp)
{
	if (likely(way->flow)) {
		flow_touch(way->flow, stamp, way->state.stamp);
		return;
	}
	way->state.stamp = stamp;
	flow_put_in(config, way->line, way->sig, way->state, way->now);
	lb_count(LB_STAT_NEW);
}

/* The backend gets the packet as it is, in another. */
static __always_inline int xdp_direct(struct xdp_md *ctx, bool v4, const struct lb_config *config, struct xdp_way *way,
				      __u32 stamp)
{
	struct xdp_hop hop;

	if (!dsr_hop(ctx, v4, config, way->backend, way->packet.len + xdp_ip_len(v4), way->own, &hop))
		return XDP_PASS;
	xdp_note(way, config, stamp);
	return dsr_send(ctx, v4, config, way->backend, way->port, &way->packet, &hop);
}

/* The backend sees the node. */
static __always_inline int xdp_translate(struct xdp_md *ctx, bool v4, const struct lb_config *config, struct xdp_way *way,
					 __u32 stamp)
{
	struct xdp_packet *packet = &way->packet;
	struct lb_tuple key = { .remote = way->backend->addr, .rport = way->port, .proto = packet->proto };
	struct xdp_hop hop;

	xdp_node(config, v4, &key.local);
	if (packet->ttl <= 1 || !xdp_route(ctx, v4, config, &key.local, &key.remote, packet->proto, packet->len, &hop))
		return XDP_PASS;
	if (unlikely(!way->state.port || stamp != way->state.stamp)) {
		struct lb_nat nat = { .client = packet->src, .vip = packet->dst, .cport = packet->sport, .vport = packet->dport,
				      .backend = way->backend->id, .stamp = stamp, .flags = LB_NAT_SNAT };

		key.lport = way->state.port;
		if (key.lport ? !nat_record(config, &key, &nat) : !nat_take(config, way->sig, &key, &nat))
			return XDP_PASS;
		way->state.port = key.lport;
	}
	xdp_note(way, config, stamp);
	return snat_send(ctx, v4, packet, &key.local, &key.remote, way->state.port, way->port, &hop);
}

/* A backend's answer to the node, to the client it is for. */
static __always_inline int xdp_answer(struct xdp_md *ctx, bool v4, const struct lb_config *config, struct xdp_packet *packet)
{
	struct lb_tuple key = { .remote = packet->src, .local = packet->dst, .rport = packet->sport, .lport = packet->dport,
				.proto = packet->proto };
	struct lb_nat *nat = nat_find(&key);
	union flow_state state = {};
	struct lb_flow *flow;
	struct xdp_hop hop;
	__u32 stamp;
	__u64 sig;

	if (!nat || !(nat->flags & LB_NAT_SNAT) || packet->ttl <= 1 || !xdp_own_mac(ctx) || xdp_unsummed(ctx, v4, packet))
		return XDP_PASS;
	if (!xdp_route(ctx, v4, config, &nat->vip, &nat->client, packet->proto, packet->len, &hop))
		return XDP_PASS;
	stamp = (nat->stamp & LB_FLOW_CLOSING) | flow_now(config);
	if (packet->proto == IPPROTO_TCP && packet->tcp_flags & XDP_ENDS)
		stamp |= LB_FLOW_CLOSING;
	if (unlikely((nat->stamp ^ stamp) & (LB_STAMP | LB_FLOW_CLOSING))) {
		*(volatile __u16 *)&nat->stamp = stamp;
		sig = lb_hash(config, &nat->client, nat->cport, &nat->vip, nat->vport, packet->proto);
		flow = flow_find(config, sig, stamp & LB_STAMP, &state);
		/* What the backend says keeps the connection alive as well. */
		if (flow && state.port == packet->dport)
			flow_touch(flow, (state.stamp & ~LB_STAMP) | stamp, state.stamp);
	}
	lb_count(LB_STAT_REVERSED);
	return snat_send(ctx, v4, packet, &nat->vip, &nat->client, nat->vport, nat->cport, &hop);
}

/* Whether a packet may be an answer to a port of ours. */
static __always_inline bool xdp_answers(const struct lb_config *config, bool v4, const struct xdp_packet *packet)
{
	__u32 port = bpf_ntohs(packet->dport);
	struct fib_addr node;

	xdp_node(config, v4, &node);
	return fib_addr_same(&packet->dst, &node) &&
	       (port - (config->snat_ports[0] >> 16) < nat_range_size(config->snat_ports[0]) ||
		port - (config->snat_ports[1] >> 16) < nat_range_size(config->snat_ports[1])) &&
	       lb_hint(&packet->src) & LB_HINT_BACKEND;
}

static __always_inline int xdp_balance(struct xdp_md *ctx, bool v4)
{
	struct lb_config *config = lb_configuration();
	struct xdp_way way = {};
	__u32 hint, stamp;
	bool direct;
	int action;

	if (!config || !xdp_parse(ctx, v4, &way.packet))
		return XDP_PASS;
	if (unlikely(xdp_answers(config, v4, &way.packet)))
		return xdp_answer(ctx, v4, config, &way.packet);
	hint = lb_hint(&way.packet.dst);
	if (!(hint & (LB_HINT_VIP | LB_HINT_NODE)))
		return XDP_PASS;
	/* First of all: what it reads may be far away. */
	if (!xdp_recall(&way, config))
		return XDP_PASS;
	way.own = xdp_own_mac(ctx);
	if (!way.own || xdp_unsummed(ctx, v4, &way.packet) || !xdp_has_node(config, v4))
		return XDP_PASS;
	if (!likely(xdp_goes_on(&way, hint)) && !xdp_serve(&way, config, hint))
		return XDP_PASS;
	stamp = flow_stamp(way.state.stamp, way.now, way.packet.proto, way.packet.tcp_flags);
	action = XDP_PASS;
	direct = way.service->flags & (way.packet.proto == IPPROTO_TCP ? LB_SVC_DSR : LB_SVC_DSR_UDP);
	if (likely(!(way.backend->flags & LB_BE_LOCAL))) {
		/* A connection goes on as it began. */
		if (direct && !way.state.port)
			action = xdp_direct(ctx, v4, config, &way, stamp);
		else if (way.state.port || !way.flow)
			action = xdp_translate(ctx, v4, config, &way, stamp);
	}
	/* tc begins it. */
	if (action == XDP_PASS && !way.flow)
		__sync_fetch_and_add(&way.service->connections, -1);
	return action;
}

int fib_lb_xdp4(struct xdp_md *ctx)
{
	return xdp_balance(ctx, true);
}

int fib_lb_xdp6(struct xdp_md *ctx)
{
	return xdp_balance(ctx, false);
}

/* What hangs on devices. The rest are programs of their own: the verifier would walk them once for each way there is through
 * the prefilter. */
int fib_lb_xdp(struct xdp_md *ctx)
{
	void *data, *end;
	__be16 type;

	if (prefilter_check(ctx) != XDP_PASS)
		return XDP_DROP;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (data + ETH_HLEN > end)
		return XDP_PASS;
	type = ((__be16 *)data)[6];
	/* Two calls, which compilers must not make one of: only to a constant place does the kernel jump directly. */
	if (likely(type == bpf_htons(ETH_P_IP))) {
		lb_xdp_tails.call(ctx, LB_XDP_V4);
		asm volatile("/* IPv4 */");
	} else if (type == bpf_htons(ETH_P_IPV6)) {
		lb_xdp_tails.call(ctx, LB_XDP_V6);
		asm volatile("/* IPv6 */");
	}
	return XDP_PASS;
}
