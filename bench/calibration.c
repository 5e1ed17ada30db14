/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The yardstick of the data-path benchmarks: parse Ethernet, IPv4 and TCP, then one hit in an LRU hash of
 * 65,536 entries keyed by the five-tuple. A program's ns a packet divided by this one's of the same run
 * holds when the machine's speed drifts. fib_nothing is the cost of the harness alone. A test run gives
 * each repetition the packet as the one before left it; fib_reset makes it anew for programs that rewrite
 * theirs, fib_spread sends each to another IPv4 address, and fib_tunnel stands for the VXLAN device a packet
 * would have come by. None is part of the product. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/tcp.h>
#include <uapi/linux/pkt_cls.h>
#include "lib/maps.h"

struct tuple {
	__be32 saddr, daddr;
	__be16 sport, dport;
	__u8 proto, pad[3];
};

/* What a packet is handed to: 0, by fib_reset; 1, by the two behind that. */
FIB_MAP("prog", __u32, __u32, next, 2, 0);
FIB_MAP("array", __u32, __u32, turn, 1, 0);
FIB_MAP("lru_hash", struct tuple, __u64, flows, 65536, 0);

int fib_calibration(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	struct tcphdr *tcp = (void *)(ip + 1);
	__u64 first = 1, *packets;

	if ((void *)(tcp + 1) > end || eth->h_proto != bpf_htons(ETH_P_IP))
		return TC_ACT_SHOT;
	struct tuple key = { .saddr = ip->saddr, .daddr = ip->daddr, .sport = tcp->source, .dport = tcp->dest,
			     .proto = ip->protocol };
	packets = flows.lookup(&key);
	if (packets)
		(*packets)++;
	else
		flows.update(&key, &first);
	return TC_ACT_OK;
}

int fib_nothing(struct __sk_buff *skb)
{
	return TC_ACT_OK;
}

/* The pod's MAC and the gateway's zero one, and a hop count of 64. Leaves the IPv4 header checksum wrong:
 * nothing here looks at it. */
int fib_reset(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct ipv6hdr *ip6 = data + ETH_HLEN;
	struct iphdr *ip = data + ETH_HLEN;
	__u32 *macs = data;

	if ((void *)(ip6 + 1) > end)
		return TC_ACT_SHOT;
	macs[0] = 0;
	macs[1] = bpf_htonl(0x0200);
	macs[2] = bpf_htonl(1);
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		ip->ttl = 64;
	else
		ip6->hop_limit = 64;
	next.call(skb, 0);
	return TC_ACT_SHOT;
}

/* From node 192.168.7.2 with identity 0x100007. A sender's "local" address is the receiver's "remote" one. */
int fib_tunnel(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key = { .tunnel_id = 0x100007, .local_ipv4 = 0xc0a80702 };

	if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), 0))
		return TC_ACT_SHOT;
	next.call(skb, 1);
	return TC_ACT_SHOT;
}

/* To every other address from 10.128.0.1 on, 50,000 of them, one after the other. */
int fib_spread(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + ETH_HLEN;
	__u32 zero = 0, *count = turn.lookup(&zero);

	if ((void *)(ip + 1) > end || !count)
		return TC_ACT_SHOT;
	*count = *count < 49999 ? *count + 1 : 0;
	ip->daddr = bpf_htonl(0x0a800001 + 2 * *count);
	next.call(skb, 1);
	return TC_ACT_SHOT;
}

/* The next of 32,768 connections: by the source port. Leaves the checksum wrong: nothing here looks at it. */
int fib_ports(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 zero = 0, *count = turn.lookup(&zero);
	__u8 *ip = data + ETH_HLEN;
	__be16 *port;

	if (!count || (void *)(ip + 1) > end)
		return TC_ACT_SHOT;
	port = (void *)ip + (*ip >> 4 == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	if ((void *)(port + 1) > end)
		return TC_ACT_SHOT;
	*port = bpf_htons(1024 + (++*count & 0x7fff));
	next.call(skb, 1);
	return TC_ACT_SHOT;
}
