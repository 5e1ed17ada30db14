/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What came out of the overlay for the host itself. */
#pragma once

#include "abi/node.h"
#include "lib/router.h"
#include "lib/slot.h"

/* To the host's stack, in by the interface which its routes to pods lead to, as reverse path filters demand. */
static __always_inline int overlay_to_host(struct __sk_buff *skb, struct pkt_ctx *pkt)
{
	struct network_config *config;
	__u32 zero = 0;

	config = nd_config.lookup(&zero);
	if (!config || !config->host_ifindex)
		return verdict_drop(skb, pkt, REASON_REDIRECT);
	router_address(skb, config->host_mac, config->host_mac);
	return verdict_pass(skb, pkt, VERDICT_TO_STACK, bpf_redirect(config->host_ifindex, BPF_F_INGRESS));
}
