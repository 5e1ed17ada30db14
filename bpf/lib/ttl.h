/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What a router does to the hop count. */
#pragma once

#include <uapi/linux/bpf.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>

/* Takes one off and mends the header checksum (RFC 1624). The header's sum, checksum included, stays what
 * it was, so this also holds for packets whose checksum the hardware has summed up. The caller has checked
 * that ttl is above one. */
static __always_inline void ttl_decrement_v4(struct iphdr *ip)
{
	__u32 check = ip->check;

	check += bpf_htons(0x0100);
	ip->check = check + (check >= 0xffff);
	ip->ttl--;
}

/* Not for packets with CHECKSUM_COMPLETE, which come from hardware but never from a pod. */
static __always_inline void ttl_decrement_v6(struct ipv6hdr *ip)
{
	ip->hop_limit--;
}

/* For any packet: tells the sum over the packet, if it has one, of the change. */
static __always_inline void ttl_decrement_v6_summed(struct __sk_buff *skb, struct ipv6hdr *ip)
{
	/* One less in the lower half of a 16-bit word: its difference is the same in every packet. */
	ip->hop_limit--;
	bpf_csum_update(skb, ~(__u32)bpf_htons(1));
}
