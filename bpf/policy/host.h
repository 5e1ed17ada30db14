/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What the host's policy is not asked about. */
#pragma once

#include "abi/ipcache.h"
#include "abi/node.h"
#include "policy/work.h"

#define HOST_ND_FIRST 133 /* router solicitation; up to redirect */
#define HOST_ND_LAST 137

static __always_inline bool host_is_message(const struct pkt_ctx *pkt)
{
	if (pkt->flags & PKT_FRAG_LATER)
		return false;
	/* Errors: the host knows what is about packets of its own. */
	if (pkt->proto == IPPROTO_ICMP)
		return pkt->icmp_type == 3 || pkt->icmp_type == 11 || pkt->icmp_type == 12;
	if (pkt->proto != IPPROTO_ICMPV6)
		return false;
	return pkt->icmp_type - 1u < 4 || (pkt->icmp_type >= HOST_ND_FIRST && pkt->icmp_type <= HOST_ND_LAST);
}

/* Between client and server of DHCP, in the direction that this end has in it: the host is a client. */
static __always_inline bool host_is_dhcp(const struct pkt_ctx *pkt, __u32 end)
{
	__u16 server = bpf_ntohs(end == POL_EGRESS ? pkt->dport : pkt->sport);
	__u16 client = bpf_ntohs(end == POL_EGRESS ? pkt->sport : pkt->dport);

	return pkt->family == 4 ? server == 67 && client == 68 : server == 547 && client == 546;
}

/* What keeps the node a node whatever its policy says. */
static __always_inline bool host_is_reserved(struct __sk_buff *skb, const struct pol_config *config, const struct pkt_ctx *pkt,
					     const struct pol_work *work)
{
	__u32 peer = work->end == POL_EGRESS ? pkt->dst_identity : pkt->src_identity, zero = 0;
	__be16 here = work->end == POL_EGRESS ? pkt->sport : pkt->dport;
	struct network_config *network;

	if (host_is_message(pkt))
		return true;
	if (pkt->proto != IPPROTO_UDP || work->host < POL_HOST_UPLINK || pkt->flags & PKT_FRAG_LATER)
		return false;
	if (host_is_dhcp(pkt, work->end))
		return true;
	if (peer != IDENTITY_REMOTE_NODE)
		return false;
	/* Nodes ask from the port they answer on: whoever only says that he asks from there reaches no other. */
	if (config->probe_port && bpf_ntohs(here) == config->probe_port)
		return true;
	network = nd_config.lookup(&zero);
	return network && network->overlay_ifindex && pkt->dport == network->overlay_port;
}

/* A packet in the midst of a connection, which may have begun when nobody was asked. */
static __always_inline bool host_may_be_older(const struct pkt_ctx *pkt, const struct pol_work *work)
{
	return pkt->proto == IPPROTO_TCP && !work->unrelated && !(pkt->flags & PKT_FRAG_LATER) && !(pkt->tcp_flags & (TCP_SYN | TCP_RST));
}
