/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* VLAN tags of frames that come in, as the host's stack takes them: one of VLAN 0 is a priority and nothing else, so what is behind it is
 * the host's. Whoever leaves tagged frames alone must not take these for such. */
#pragma once

#include <uapi/linux/bpf.h>
#include "lib/likely.h"
#include "lib/slot.h"

#define VLAN_NUMBER 0xfff
#define VLAN_PRIORITIES 3

enum vlan {
	VLAN_NONE,  /* the frame has no tag any longer */
	VLAN_OTHER, /* for the interface of a VLAN */
	VLAN_ODD,   /* more priorities than anybody needs: vlan_drop */
};

/* Takes off what is a priority. Invalidates packet pointers. */
static __always_inline enum vlan vlan_of(struct __sk_buff *skb)
{
#pragma unroll
	for (int tag = 0; tag < VLAN_PRIORITIES; tag++) {
		if (likely(!skb->vlan_present))
			return VLAN_NONE;
		if (skb->vlan_tci & VLAN_NUMBER)
			return VLAN_OTHER;
		/* The next one takes its place. */
		if (bpf_skb_vlan_pop(skb))
			return VLAN_ODD;
	}
	return skb->vlan_present ? VLAN_ODD : VLAN_NONE;
}

/* A frame of the uplink that nothing is known of but that it is odd. */
static __always_inline int vlan_drop(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();

	if (!pkt)
		return TC_ACT_SHOT;
	__builtin_memset(pkt, 0, sizeof(*pkt));
	pkt->direction = DIR_FROM_UPLINK;
	pkt->ethertype = bpf_htons(ETH_P_8021Q);
	return verdict_drop(skb, pkt, REASON_MALFORMED);
}
