/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Slot NEIGHBOUR: answers a pod that asks for a MAC, though it need not ask.
 *
 * A pod has permanent neighbour entries for its gateway. Should something in it flush them or ask on
 * purpose (arping), the node answers for every address but the pod's own: each of the pod's neighbours is
 * the gateway. The question itself is turned into the answer and sent back, so nobody else hears either.
 * Duplicate address detection gets no answer.
 */
#pragma once

#include <uapi/linux/if_ether.h>
#include <uapi/linux/ipv6.h>
#include "abi/endpoint.h"
#include "lib/parse.h"
#include "lib/slot.h"

/* As in linux/if_arp.h, which needs the C library's headers. */
#define ARPHRD_ETHER 1
#define ARPOP_REQUEST 1
#define ARPOP_REPLY 2

struct arp_frame {
	struct ethhdr eth;
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_len;
	__u8 protocol_len;
	__be16 operation;
	__u8 sender_mac[ETH_ALEN];
	__be16 sender_ip[2]; /* halves: not aligned to words */
	__u8 target_mac[ETH_ALEN];
	__be16 target_ip[2];
} __attribute__((packed));

#define ND_SOLICITATION 135
#define ND_ADVERTISEMENT 136
#define ND_OPT_SOURCE_MAC 1
#define ND_OPT_TARGET_MAC 2
/* Router, solicited, override. */
#define ND_FLAGS 0xe0000000

/* A solicitation as Linux sends it: with one option, the sender's MAC. */
struct nd_frame {
	struct ethhdr eth;
	struct ipv6hdr ip;
	__u8 type;
	__u8 code;
	__sum16 check;
	__be32 flags;
	struct in6_addr target;
	__u8 option;
	__u8 option_len; /* units of eight bytes */
	__u8 mac[ETH_ALEN];
} __attribute__((packed));
#define ND_MESSAGE (sizeof(struct nd_frame) - __builtin_offsetof(struct nd_frame, type))

static __always_inline void neighbour_turn_eth(struct ethhdr *eth, const struct endpoint *pod)
{
	__builtin_memcpy(eth->h_dest, pod->pod_mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, pod->host_mac, ETH_ALEN);
}

static __always_inline __u32 neighbour_answer_arp(struct __sk_buff *skb, const struct endpoint *pod)
{
	struct arp_frame *frame;
	__be16 asked[2];

	bpf_skb_pull_data(skb, sizeof(*frame));
	frame = (void *)(long)skb->data;
	if ((void *)(frame + 1) > (void *)(long)skb->data_end)
		return REASON_TRUNCATED;
	if (frame->operation != bpf_htons(ARPOP_REQUEST) || frame->hardware != bpf_htons(ARPHRD_ETHER) ||
	    frame->protocol != bpf_htons(ETH_P_IP) || frame->hardware_len != ETH_ALEN || frame->protocol_len != 4)
		return REASON_ARP;
	__builtin_memcpy(asked, frame->target_ip, sizeof(asked));
	if ((asked[0] | (__u32)asked[1] << 16) == pod->v4)
		return REASON_ARP;
	frame->operation = bpf_htons(ARPOP_REPLY);
	__builtin_memcpy(frame->target_mac, frame->sender_mac, sizeof(frame->target_mac) + sizeof(asked));
	__builtin_memcpy(frame->sender_mac, pod->host_mac, ETH_ALEN);
	__builtin_memcpy(frame->sender_ip, asked, sizeof(asked));
	neighbour_turn_eth(&frame->eth, pod);
	return REASON_NONE;
}

static __always_inline __sum16 neighbour_fold(__s64 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

static __always_inline __u32 neighbour_answer_nd(struct __sk_buff *skb, const struct endpoint *pod)
{
	/* The pseudo header's last two words. */
	__be32 tail[2] = { bpf_htonl(ND_MESSAGE), bpf_htonl(IPPROTO_ICMPV6) };
	struct nd_frame *frame;
	struct fib_addr target;
	__s64 sum;

	bpf_skb_pull_data(skb, sizeof(*frame));
	frame = (void *)(long)skb->data;
	if ((void *)(frame + 1) > (void *)(long)skb->data_end || skb->len != sizeof(*frame))
		return REASON_NEIGHBOUR;
	fib_addr_set_v6(&target, &frame->target);
	/* The unspecified source is duplicate address detection; link-local targets are not to be reached. */
	if (frame->type != ND_SOLICITATION || frame->ip.hop_limit != 255 || frame->option != ND_OPT_SOURCE_MAC ||
	    frame->option_len != 1 || !frame->ip.saddr.s6_addr32[0] || fib_addr_same(&target, &pod->v6) ||
	    (target.w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000))
		return REASON_NEIGHBOUR;
	frame->ip.daddr = frame->ip.saddr;
	frame->ip.saddr = frame->target;
	frame->type = ND_ADVERTISEMENT;
	frame->check = 0;
	frame->flags = bpf_htonl(ND_FLAGS);
	frame->option = ND_OPT_TARGET_MAC;
	__builtin_memcpy(frame->mac, pod->host_mac, ETH_ALEN);
	neighbour_turn_eth(&frame->eth, pod);
	sum = bpf_csum_diff(0, 0, tail, sizeof(tail), 0);
	sum = bpf_csum_diff(0, 0, (void *)&frame->ip.saddr, 2 * sizeof(struct in6_addr) + ND_MESSAGE, sum);
	frame->check = neighbour_fold(sum);
	return REASON_NONE;
}

int fib_neighbour(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();
	__u32 reason;
	struct endpoint *pod;

	if (!pkt)
		return TC_ACT_SHOT;
	pod = endpoint_by_ifindex(skb->ifindex);
	if (!pod)
		return verdict_drop(skb, pkt, REASON_NO_ENDPOINT);
	reason = pkt->family ? neighbour_answer_nd(skb, pod) : neighbour_answer_arp(skb, pod);
	if (reason)
		return verdict_drop(skb, pkt, reason);
	return verdict_pass(skb, pkt, VERDICT_DELIVERED, bpf_redirect_peer(skb->ifindex, 0));
}
