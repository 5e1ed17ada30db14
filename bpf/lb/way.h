/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Which backend a client's packet goes to: the connection's, or one chosen now. */
#pragma once

#include "abi/pipeline.h"
#include "lb/choose.h"
#include "lb/flow.h"
#include "lb/front.h"

#define WAY_SYN 0x02

struct lb_way {
	struct lb_service *service;
	struct lb_backend *backend; /* null: there is none */
	struct lb_flow *line;       /* where the connection is, or will be */
	struct lb_flow *flow;       /* the connection; null: it begins with this packet */
	union flow_state state;
	__u64 sig;
	__u32 now;
	__u32 stamp; /* what the packet makes of the connection's */
	__be16 port; /* the backend's */
};

enum way_kind {
	WAY_OTHER = 0,  /* no frontend's packet */
	WAY_SERVED = 1, /* way->backend is set */
	WAY_EMPTY = 2,  /* the service has no backend */
	WAY_SOURCE = 3, /* the client is not admitted */
};

/* False: there is no table of connections. */
static __always_inline bool way_recall(struct lb_way *way, const struct lb_config *config, const struct pkt_ctx *pkt)
{
	struct lb_backend *backend;

	way->now = flow_now(config);
	way->sig = lb_hash(config, &pkt->src, pkt->sport, &pkt->dst, pkt->dport, pkt->proto);
	way->line = flow_line(LB_FLOWS, config->flow_mask, way->sig);
	if (!way->line)
		return false;
	way->flow = flow_find_in(config, way->line, way->sig, way->now, &way->state);
	way->backend = 0;
	if (!way->flow || flow_begins(way->state.stamp, pkt->proto, pkt->tcp_flags))
		return true;
	backend = lb_backend(way->state.backend);
	/* One null check, not two that the verifier cannot connect. */
	FLOW_OPAQUE(backend);
	/* What is going away takes nothing new. */
	if (backend && !(pkt->tcp_flags & WAY_SYN && backend->state != LB_BE_ACTIVE))
		way->backend = backend;
	return true;
}

/* An established TCP connection needs no frontend: it goes on for as long as its backend is there. */
static __always_inline bool way_goes_on(struct lb_way *way, const struct pkt_ctx *pkt, __u32 hint)
{
	if (!way->backend || pkt->proto != IPPROTO_TCP || pkt->tcp_flags & WAY_SYN || hint & LB_HINT_RANGE)
		return false;
	way->service = lb_service(way->backend->service);
	way->port = way->backend->port;
	return way->service && !(way->service->flags & LB_SVC_SOURCES);
}

/* All other packets. `outside`: the client is no pod or node of the cluster. */
static __always_inline enum way_kind way_serve(struct lb_way *way, const struct lb_config *config, const struct pkt_ctx *pkt,
					       __u32 hint, bool outside)
{
	struct lb_front *front = lb_front_hinted(hint, &pkt->dst, pkt->dport, pkt->proto);
	__u64 hash = way->sig;

	if (!front)
		return WAY_OTHER;
	way->service = lb_service(front->service);
	if (!way->service)
		return WAY_OTHER;
	outside = outside && front->flags & LB_FRONT_OUTSIDE;
	if (outside && !choose_admits(way->service, front->service, &pkt->src))
		return WAY_SOURCE;
	if (!way->backend || way->backend->service != front->service) {
		/* A client with affinity is one, whatever port it speaks from. */
		if (unlikely(way->service->flags & LB_SVC_AFFINITY))
			hash = lb_hash(config, &pkt->src, 0, &pkt->dst, pkt->dport, pkt->proto);
		way->backend = choose_backend(config, way->service, front->service, outside, &pkt->src, hash);
		if (!way->backend)
			return WAY_EMPTY;
		if (way->flow)
			flow_forget(way->flow);
		way->flow = 0;
		way->state.word = way->backend->id;
	}
	way->port = pkt->proto == IPPROTO_SCTP ? pkt->dport : lb_front_port(front, way->backend, pkt->dport);
	return WAY_SERVED;
}

static __always_inline enum way_kind way_find(struct lb_way *way, const struct lb_config *config, const struct pkt_ctx *pkt,
					      __u32 hint, bool outside)
{
	enum way_kind kind;

	if (!way_recall(way, config, pkt))
		return WAY_OTHER;
	kind = likely(way_goes_on(way, pkt, hint)) ? WAY_SERVED : way_serve(way, config, pkt, hint, outside);
	way->stamp = flow_stamp(way->state.stamp, way->now, pkt->proto, pkt->tcp_flags);
	return kind;
}

/* Has the connection remembered. */
static __always_inline void way_note(struct lb_way *way, const struct lb_config *config)
{
	if (likely(way->flow)) {
		flow_touch(way->flow, way->stamp, way->state.stamp);
		return;
	}
	way->state.stamp = way->stamp;
	flow_put_in(config, way->line, way->sig, way->state, way->now);
	lb_count(LB_STAT_NEW);
}
