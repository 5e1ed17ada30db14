/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* VXLAN (RFC 7348) with the sender's identity: its low 24 bits are the network identifier, the upper 8 are the
 * group policy id (draft-smith-vxlan-group-policy), which is left out while they are zero, as in clusters 1 to 15. */
#pragma once

#include "abi/node.h"
#include "lib/slot.h"

#define OVERLAY_TTL 64

/* As the kernel's struct vxlan_metadata. */
struct overlay_policy {
	__u32 gbp;
};

/* What a packet says of its way here. */
struct overlay_sender {
	struct fib_addr node; /* source address of the outer packet */
	__u32 identity;
};

/* Sends the packet to a node in the overlay. The inner frame's addresses mean nothing: the receiver writes its own. */
static __always_inline int overlay_send(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct node_entry *node,
					__u32 identity)
{
	struct bpf_tunnel_key key = { .tunnel_id = identity & 0xffffff, .tunnel_ttl = OVERLAY_TTL };
	struct overlay_policy policy = { .gbp = identity >> 24 };
	struct network_config *config;
	__u32 zero = 0;
	__u64 flags;

	config = nd_config.lookup(&zero);
	if (!config || !config->overlay_ifindex)
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	/* From the address that peers expect: the kernel might take another one of the interface. */
	if (node->flags & NODE_TUNNEL_V6) {
		flags = BPF_F_TUNINFO_IPV6;
		__builtin_memcpy(key.remote_ipv6, node->v6.w, sizeof(key.remote_ipv6));
		__builtin_memcpy(key.local_ipv6, config->v6.w, sizeof(key.local_ipv6));
	} else {
		/* The inner checksums are what matters; over IPv6 the outer one is not optional. */
		flags = BPF_F_ZERO_CSUM_TX;
		key.remote_ipv4 = bpf_ntohl(node->v4);
		key.local_ipv4 = bpf_ntohl(config->v4);
	}
	/* The policy id is given even when it is zero and will be left out: where none is given the kernel (tried: 6.18)
	 * sends whatever its stack happens to hold. */
	if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags) ||
	    bpf_skb_set_tunnel_opt(skb, &policy, sizeof(policy)))
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	return verdict_pass(skb, pkt, VERDICT_TO_OVERLAY, bpf_redirect(config->overlay_ifindex, 0));
}

/* False: the packet did not come out of a tunnel. */
static __always_inline bool overlay_receive(struct __sk_buff *skb, struct overlay_sender *sender)
{
	struct overlay_policy policy = {};
	struct bpf_tunnel_key key = {};

	if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0)) {
		fib_addr_set_v4(&sender->node, bpf_htonl(key.remote_ipv4));
	} else if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6)) {
		__builtin_memcpy(sender->node.w, key.remote_ipv6, sizeof(sender->node));
	} else {
		return false;
	}
	sender->identity = key.tunnel_id & 0xffffff;
	/* Bits above the policy id are flags. */
	if (bpf_skb_get_tunnel_opt(skb, &policy, sizeof(policy)) > 0)
		sender->identity |= (policy.gbp & 0xffff) << 24;
	return true;
}
