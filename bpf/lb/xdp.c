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

/* The backend of a new connection; `*state` begins with it. */
static __always_inline struct lb_backend *xdp_choose(const struct lb_config *config, struct lb_service *service,
						     const struct lb_front *front, const struct xdp_packet *packet,
						     __u64 sig, union flow_state *state)
{
	bool outside = front->flags & LB_FRONT_OUTSIDE;
	struct lb_backend *backend;

	/* A client with affinity is one, whatever port it speaks from. */
	if (unlikely(service->flags & LB_SVC_AFFINITY))
		sig = lb_hash(config, &packet->src, 0, &packet->dst, packet->dport, packet->proto);
	backend = choose_backend(config, service, front->service, outside, &packet->src, sig);
	state->word = 0;
	if (backend)
		state->backend = backend->id;
	return backend;
}

static __always_inline int xdp_balance(struct xdp_md *ctx, bool v4)
{
	struct lb_config *config = lb_configuration();
	union flow_state state = {};
	struct lb_backend *backend = 0;
	struct lb_service *service;
	struct xdp_packet packet;
	struct xdp_hop hop;
	struct lb_front *front;
	struct lb_flow *way;
	__u32 now, stamp;
	__u64 sig, own;
	__be16 port;

	if (!config || !xdp_parse(ctx, v4, &packet))
		return XDP_PASS;
	front = lb_front_find(&packet.dst, packet.dport, packet.proto);
	if (!front)
		return XDP_PASS;
	service = lb_service(front->service);
	own = xdp_own_mac(ctx);
	if (!service || !own || xdp_unsummed(ctx, v4, &packet))
		return XDP_PASS;
	if (front->flags & LB_FRONT_OUTSIDE && !choose_admits(service, front->service, &packet.src))
		return XDP_PASS;
	now = flow_now(config);
	sig = lb_hash(config, &packet.src, packet.sport, &packet.dst, packet.dport, packet.proto);
	way = flow_find(config, sig, now, &state);
	if (likely(way))
		backend = lb_backend(state.backend);
	if (unlikely(!backend)) {
		way = 0;
		backend = xdp_choose(config, service, front, &packet, sig, &state);
		if (!backend)
			return XDP_PASS;
	}
	port = lb_front_port(front, backend, packet.dport);
	if (backend->flags & LB_BE_LOCAL || !dsr_hop(ctx, v4, config, backend, packet.len + xdp_ip_len(v4), own, &hop)) {
		if (!way)
			__sync_fetch_and_add(&service->connections, -1);
		return XDP_PASS;
	}
	stamp = flow_stamp(state.stamp, now, packet.proto, packet.tcp_flags);
	if (likely(way)) {
		flow_touch(way, stamp, state.stamp);
	} else {
		state.stamp = stamp;
		flow_put(config, sig, state, now);
		lb_count(LB_STAT_NEW);
	}
	return dsr_send(ctx, v4, config, backend, port, &packet, &hop);
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
