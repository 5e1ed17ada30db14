/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Direct server return, as XDP does it (xdp_dsr.h): the client's packet as it is, in IP, to its backend. The backend's port
 * travels in the outer header: IPv4 identification, IPv6 flow label. What is still to be cut into segments carries it in an
 * option instead, for whoever cuts counts IPv4's identification up from segment to segment.
 */
#pragma once

#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include "abi/pipeline.h"
#include "lib/csum.h"

#define DSR_HOPS 64
#define DSR_OPTION 0x9e /* an option for experiments (RFC 4727), copied into fragments; its two bytes are the port */
#define DSR_OPTION_LEN 4

/* Bytes that a packet may grow by. */
static __always_inline __u32 dsr_room(__u32 family)
{
	return family == 4 ? sizeof(struct iphdr) + DSR_OPTION_LEN : sizeof(struct ipv6hdr);
}

/* Bytes that this one does grow by. */
static __always_inline __u32 dsr_header(const struct __sk_buff *skb, __u32 family)
{
	if (family == 6)
		return sizeof(struct ipv6hdr);
	return skb->gso_size ? sizeof(struct iphdr) + DSR_OPTION_LEN : sizeof(struct iphdr);
}

static __always_inline __u8 dsr_proto(__u32 family)
{
	return family == 4 ? IPPROTO_IPIP : IPPROTO_IPV6;
}

static __always_inline bool dsr_is_tunnel(const struct pkt_ctx *pkt)
{
	return pkt->proto == dsr_proto(pkt->family) && !(pkt->flags & (PKT_FRAG_FIRST | PKT_FRAG_LATER));
}

/* Five words, or six with the option; which is checked by the caller. */
static __always_inline void dsr_write_v4(__be32 *words, bool option, __u32 len, __u8 tos, __be32 from, __be32 to, __be16 port)
{
	__u64 more = 0;

	if (option) {
		words[5] = bpf_htonl((__u32)DSR_OPTION << 24 | DSR_OPTION_LEN << 16 | bpf_ntohs(port));
		more = words[5];
	}
	words[0] = bpf_htonl((option ? 0x46u : 0x45u) << 24 | (__u32)tos << 16 | len);
	words[1] = (__u32)bpf_htons(0x4000) << 16 | port;
	words[2] = bpf_htonl((__u32)DSR_HOPS << 24 | (__u32)IPPROTO_IPIP << 16);
	words[3] = from;
	words[4] = to;
	words[2] |= (__u32)(__u16)~csum_fold(more + words[0] + words[1] + words[2] + words[3] + words[4]) << 16;
}

/* Puts the packet into another. False: it must be dropped. */
static __always_inline bool dsr_encap(struct __sk_buff *skb, struct pkt_ctx *pkt, const struct fib_addr *from,
				      const struct fib_addr *to, __be16 port)
{
	__u32 room = dsr_header(skb, pkt->family);
	bool option = pkt->family == 4 && skb->gso_size;
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;
	void *data, *end;
	__be32 *words;
	__u8 *ip, tos;

	/* Only what is still to be cut into segments need be known for a tunnel's: the overlay takes no tunnel in it past its
	 * device. */
	if (skb->gso_size)
		flags |= pkt->family == 4 ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV6;
	if (bpf_skb_adjust_room(skb, room, BPF_ADJ_ROOM_MAC, flags) ||
	    bpf_skb_pull_data(skb, ETH_HLEN + room + sizeof(struct iphdr)))
		return false;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	words = data + ETH_HLEN;
	if (pkt->family == 4) {
		ip = data + ETH_HLEN + sizeof(struct iphdr) + (option ? DSR_OPTION_LEN : 0);
		if ((void *)(ip + sizeof(struct iphdr)) > end)
			return false;
		dsr_write_v4(words, option, skb->len - ETH_HLEN, ip[1], from->w[3], to->w[3], port);
	} else {
		ip = data + ETH_HLEN + sizeof(struct ipv6hdr);
		if ((void *)(ip + sizeof(struct iphdr)) > end)
			return false;
		tos = ip[0] << 4 | ip[1] >> 4;
		words[0] = bpf_htonl(6u << 28 | (__u32)tos << 20 | bpf_ntohs(port));
		words[1] = bpf_htonl((skb->len - ETH_HLEN - room) << 16 | (__u32)IPPROTO_IPV6 << 8 | DSR_HOPS);
		__builtin_memcpy(words + 2, from, sizeof(*from));
		__builtin_memcpy(words + 6, to, sizeof(*to));
	}
	if (!(pkt->flags & PKT_TRANSLATED)) {
		pkt->orig_dst = pkt->dst;
		pkt->orig_dport = pkt->dport;
		pkt->flags |= PKT_TRANSLATED;
	}
	pkt->src = *from;
	pkt->dst = *to;
	pkt->sport = pkt->dport = 0;
	pkt->proto = dsr_proto(pkt->family);
	pkt->l4_off += room;
	return true;
}

/* The backend's port, in a packet that arrived. `room`: bytes of the outer header. */
static __always_inline bool dsr_port(struct __sk_buff *skb, const struct pkt_ctx *pkt, __be16 *port, __u32 *room)
{
	__be16 option[2];

	*room = pkt->l4_off - ETH_HLEN;
	if (pkt->family == 4 && *room == sizeof(struct iphdr) + DSR_OPTION_LEN) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(struct iphdr), option, sizeof(option)))
			return false;
		*port = option[1];
		return option[0] == bpf_htons(DSR_OPTION << 8 | DSR_OPTION_LEN);
	}
	if (*room != (pkt->family == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)))
		return false;
	return !bpf_skb_load_bytes(skb, ETH_HLEN + (pkt->family == 4 ? 4 : 2), port, sizeof(*port));
}
