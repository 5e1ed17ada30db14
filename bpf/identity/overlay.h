/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* VXLAN (RFC 7348) with the sender's identity: its low 24 bits are the network identifier, the upper 8 are the
 * group policy id (draft-smith-vxlan-group-policy), which is left out while it is zero, as in clusters 1 to 15. */
#pragma once

#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include "abi/node.h"
#include "identity/redirect.h"
#include "lib/slot.h"

#define OVERLAY_TTL 64
#define OVERLAY_ECN 0x3 /* of type of service and traffic class */

#define VXLAN_HAS_VNI 0x08
#define VXLAN_HAS_POLICY 0x80

/* Newer than the header that BCC brings (Linux 5.14). */
#define ADJ_ROOM_ENCAP_L2_ETH (1ull << 6)

/* As the kernel's struct vxlan_metadata. */
struct overlay_policy {
	__u32 gbp;
};

/* What a packet says of its way here. */
struct overlay_sender {
	struct fib_addr node; /* source address of the outer packet */
	__u32 identity;
};

/* What stands between the two Ethernet headers: up to the inner frame, and its header. */
struct overlay_head {
	struct iphdr ip;
	__be16 sport, dport, length, check;
	__u8 flags, reserved;
	__be16 policy;
	__be32 vni;
	__u8 inner_macs[2 * ETH_ALEN];
	__be16 inner_proto;
} __attribute__((packed));
_Static_assert(sizeof(struct overlay_head) == 50, "ABI");

static __always_inline __u8 overlay_ecn(struct __sk_buff *skb, const struct pkt_ctx *pkt)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u8 *ip = data + ETH_HLEN;

	if ((void *)(ip + 2) > end)
		return 0;
	return (pkt->family == 4 ? ip[1] : ip[1] >> 4) & OVERLAY_ECN;
}

static __always_inline __sum16 overlay_ip_sum(const struct overlay_head *head)
{
	const __u16 *word = (const void *)head;
	__u32 sum = 0;

#pragma unroll
	for (int at = 0; at < sizeof(struct iphdr) / 2; at++)
		sum += word[at];
	sum = (sum & 0xffff) + (sum >> 16);
	sum += sum >> 16;
	return ~sum;
}

/* Over IPv4 to a node on the same network: the headers are written here, and the packet goes to the uplink past the
 * host's output path, whose netfilter hooks and route lookup would cost it more than all else. False: nothing has
 * changed, the device must do it (an older kernel; a packet that is in a tunnel already; segments that are not TCP's). */
static __always_inline bool overlay_direct(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct node_entry *node,
					   const struct network_config *config, __u32 identity, int *action)
{
	struct bpf_redir_neigh hop = { .nh_family = 2 /* AF_INET */, .ipv4_nh = node->v4 };
	__u32 hash = bpf_get_hash_recalc(skb);
	__u8 ecn = overlay_ecn(skb, pkt);
	struct overlay_head *head;
	struct ethhdr *eth;

	if (bpf_skb_adjust_room(skb, sizeof(*head), BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
					BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | ADJ_ROOM_ENCAP_L2_ETH))
		return false;
	eth = (void *)(long)skb->data;
	head = (void *)(eth + 1);
	if ((void *)(head + 1) > (void *)(long)skb->data_end) {
		*action = verdict_drop(skb, pkt, REASON_REDIRECT);
		return true;
	}
	__builtin_memset(head, 0, sizeof(*head));
	head->inner_proto = eth->h_proto;
	eth->h_proto = bpf_htons(ETH_P_IP);
	head->ip.version = 4;
	head->ip.ihl = 5;
	head->ip.tos = ecn;
	head->ip.tot_len = bpf_htons(skb->len - ETH_HLEN);
	/* Never a fragment, so it needs no identification (RFC 6864): one network has one MTU. */
	head->ip.frag_off = bpf_htons(0x4000);
	head->ip.ttl = OVERLAY_TTL;
	head->ip.protocol = IPPROTO_UDP;
	head->ip.saddr = config->v4;
	head->ip.daddr = node->v4;
	head->ip.check = overlay_ip_sum(head);
	/* The flow, for whoever deals packets out by ports (RFC 7348, 5). */
	head->sport = bpf_htons(0x8000 | (hash & 0x7fff));
	head->dport = config->overlay_port;
	head->length = bpf_htons(skb->len - ETH_HLEN - sizeof(struct iphdr));
	head->flags = identity >> 24 ? VXLAN_HAS_VNI | VXLAN_HAS_POLICY : VXLAN_HAS_VNI;
	head->policy = bpf_htons(identity >> 24);
	head->vni = bpf_htonl(identity << 8);
	*action = verdict_pass(skb, pkt, VERDICT_TO_OVERLAY, redirect_neigh(node->ifindex, &hop, sizeof(hop), 0));
	return true;
}

/* By the VXLAN device, which finds the way. */
static __always_inline int overlay_by_device(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct node_entry *node,
					     const struct network_config *config, __u32 identity)
{
	struct bpf_tunnel_key key = { .tunnel_id = identity & 0xffffff, .tunnel_ttl = OVERLAY_TTL };
	struct overlay_policy policy = { .gbp = identity >> 24 };
	__u64 flags;

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

/* Sends the packet to a node in the overlay. The inner frame's addresses mean nothing: the receiver writes its own. */
static __always_inline int overlay_send(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct node_entry *node,
					__u32 identity)
{
	struct network_config *config;
	__u32 zero = 0;
	int action;

	config = nd_config.lookup(&zero);
	if (!config || !config->overlay_ifindex)
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	if (node->flags & NODE_DIRECT && config->overlay_port &&
	    overlay_direct(skb, pkt, node, config, identity, &action))
		return action;
	return overlay_by_device(skb, pkt, node, config, identity);
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
