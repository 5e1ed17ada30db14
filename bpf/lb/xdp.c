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
#include "lb/xdp_packet.h"
#include "lb/xdp_route.h"
#include "lb/xdp_dsr.h"

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
	struct lb_front *front = lb_front_hinted(hint, &packet->dst, packet->dport, packet->proto);
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

static __always_inline int xdp_balance(struct xdp_md *ctx, bool v4)
{
	struct lb_config *config = lb_configuration();
	struct xdp_way way = {};
	struct xdp_hop hop;
	__u32 hint, stamp;

	if (!config || !xdp_parse(ctx, v4, &way.packet))
		return XDP_PASS;
	hint = lb_hint(&way.packet.dst);
	if (likely(!(hint & (LB_HINT_VIP | LB_HINT_NODE))))
		return XDP_PASS;
	/* First of all: what it reads may be far away. */
	if (!xdp_recall(&way, config))
		return XDP_PASS;
	way.own = xdp_own_mac(ctx);
	if (!way.own || xdp_unsummed(ctx, v4, &way.packet))
		return XDP_PASS;
	if (!likely(xdp_goes_on(&way, hint)) && !xdp_serve(&way, config, hint))
		return XDP_PASS;
	if (way.backend->flags & LB_BE_LOCAL ||
	    !dsr_hop(ctx, v4, config, way.backend, way.packet.len + xdp_ip_len(v4), way.own, &hop)) {
		if (!way.flow)
			__sync_fetch_and_add(&way.service->connections, -1);
		return XDP_PASS;
	}
	stamp = flow_stamp(way.state.stamp, way.now, way.packet.proto, way.packet.tcp_flags);
	if (likely(way.flow)) {
		flow_touch(way.flow, stamp, way.state.stamp);
	} else {
		way.state.stamp = stamp;
		flow_put_in(config, way.line, way.sig, way.state, way.now);
		lb_count(LB_STAT_NEW);
	}
	return dsr_send(ctx, v4, config, way.backend, way.port, &way.packet, &hop);
}

int fib_lb_xdp(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__be16 type;

	if (data + ETH_HLEN > end)
		return XDP_PASS;
	type = ((__be16 *)data)[6];
	if (likely(type == bpf_htons(ETH_P_IP)))
		return xdp_balance(ctx, true);
	if (type == bpf_htons(ETH_P_IPV6))
		return xdp_balance(ctx, false);
	return XDP_PASS;
}
