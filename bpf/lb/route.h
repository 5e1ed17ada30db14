/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The way out past the host's stack: by its routes, but not through its netfilter hooks and reverse path filters. */
#pragma once

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include "identity/redirect.h"
#include "lib/router.h"
#include "lib/slot.h"

#define ROUTE_AF_INET 2
#define ROUTE_AF_INET6 10

enum route_result {
	ROUTE_OK = 0,
	ROUTE_TOO_BIG = 1, /* for route->mtu_result */
	ROUTE_NONE = 2, /* or for this very host, or not to be forwarded */
};

struct route {
	struct bpf_fib_lookup fib;
	bool resolved; /* the next hop's MAC is known */
};

/* Bytes that a wire has to take at once: of a super-packet, those of its largest segment. */
static __always_inline __u32 route_len(struct __sk_buff *skb, const struct pkt_ctx *pkt)
{
	if (!skb->gso_size || skb->gso_size == GSO_BY_FRAGS)
		return skb->len - ETH_HLEN;
	return skb->gso_size + pkt->l4_off - ETH_HLEN + pkt->l4_len;
}

/* From `src` to `dst`; `len` is what the packet will have. */
static __always_inline enum route_result route_find(struct __sk_buff *skb, __u32 family, const struct fib_addr *src,
						    const struct fib_addr *dst, __u8 proto, __u32 len, struct route *route)
{
	struct bpf_fib_lookup *fib = &route->fib;
	long found;

	__builtin_memset(fib, 0, sizeof(*fib));
	fib->l4_protocol = proto;
	fib->tot_len = len;
	fib->ifindex = skb->ifindex;
	if (family == 4) {
		fib->family = ROUTE_AF_INET;
		fib->ipv4_src = src->w[3];
		fib->ipv4_dst = dst->w[3];
	} else {
		fib->family = ROUTE_AF_INET6;
		__builtin_memcpy(fib->ipv6_src, src, sizeof(*src));
		__builtin_memcpy(fib->ipv6_dst, dst, sizeof(*dst));
	}
	found = bpf_fib_lookup(skb, fib, sizeof(*fib), 0);
	route->resolved = found == BPF_FIB_LKUP_RET_SUCCESS;
	if (likely(found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH))
		return ROUTE_OK;
	return found == BPF_FIB_LKUP_RET_FRAG_NEEDED ? ROUTE_TOO_BIG : ROUTE_NONE;
}

/* The packet, ready but for its Ethernet header, goes where a route leads that was found OK. */
static __always_inline int route_leave(struct __sk_buff *skb, struct pkt_ctx *pkt, struct route *route)
{
	struct bpf_redir_neigh hop = {};
	struct bpf_fib_lookup *fib = &route->fib;
	int action;

	if (likely(route->resolved)) {
		router_address(skb, fib->dmac, fib->smac);
		action = bpf_redirect(fib->ifindex, 0);
	} else {
		hop.nh_family = fib->family;
		__builtin_memcpy(hop.ipv6_nh, fib->ipv6_dst, sizeof(hop.ipv6_nh));
		action = redirect_neigh(fib->ifindex, &hop, sizeof(hop), 0);
	}
	return verdict_pass(skb, pkt, VERDICT_TO_STACK, action);
}
