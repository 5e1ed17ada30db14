/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What services of a later day will put into the pipeline's slots, as small as can be. */
#include "lib/slot.h"

/* LB: what is sent to 10.1.0.200 goes to the pod 10.1.0.11. */
int fib_t_lb(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();

	if (!pkt)
		return TC_ACT_SHOT;
	if (pkt->dst.w[3] == bpf_htonl(0x0a0100c8)) {
		pkt->orig_dst = pkt->dst;
		pkt->orig_dport = pkt->dport;
		pkt->flags |= PKT_TRANSLATED;
		fib_addr_set_v4(&pkt->dst, bpf_htonl(0x0a01000b));
	}
	return slot_after_lb(skb, pkt);
}

/* POLICY_EGRESS: nothing to port 23. */
int fib_t_egress(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();

	if (!pkt)
		return TC_ACT_SHOT;
	if (pkt->dport == bpf_htons(23))
		return verdict_drop(skb, pkt, REASON_MALFORMED);
	return slot_after_policy_egress(skb, pkt);
}

/* POLICY_INGRESS: a pod takes only what comes from identity 1010, or from reserved ones, to ports below 1000. */
int fib_t_ingress(struct __sk_buff *skb)
{
	struct pkt_ctx *pkt = slot_packet();

	if (!pkt)
		return TC_ACT_SHOT;
	if ((pkt->src_identity > 8 && pkt->src_identity != 1010) || bpf_ntohs(pkt->dport) >= 1000)
		return verdict_drop(skb, pkt, REASON_ARP);
	return slot_after_policy_ingress(skb, pkt);
}
