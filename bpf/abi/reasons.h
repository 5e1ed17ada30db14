/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Generated from bpf/abi/reasons.tsv; do not edit. */
#pragma once

enum drop_reason {
	REASON_NONE = 0, /* Not dropped. */
	REASON_NO_ENDPOINT = 1, /* The interface has no entry in the endpoint map. */
	REASON_SPOOFED_MAC = 2, /* The source MAC is not the pod's. */
	REASON_SPOOFED_IPV4 = 3, /* The IPv4 source is not the pod's address. */
	REASON_SPOOFED_IPV6 = 4, /* The IPv6 source is not the pod's address. */
	REASON_TRUNCATED = 5, /* The packet ends before its headers do. */
	REASON_MALFORMED = 6, /* A header field contradicts itself (IP version, header length). */
	REASON_EXT_HEADERS = 7, /* More than six IPv6 extension headers. */
	REASON_VLAN = 8, /* The pod sent a VLAN-tagged frame. */
	REASON_ETHERTYPE = 9, /* Neither IPv4, IPv6 nor ARP. */
	REASON_ARP = 10, /* ARP that needs no answer: a reply, or about the pod's own address. */
	REASON_NEIGHBOUR = 11, /* Neighbour discovery that needs no answer: advertisements, duplicate address detection. */
	REASON_BROADCAST = 12, /* Broadcast, DHCP included. */
	REASON_MULTICAST = 13, /* Multicast; also a pod's router solicitations and multicast listener reports. */
	REASON_WRONG_MAC = 14, /* A unicast frame for another MAC than the gateway's. */
	REASON_LINK_LOCAL = 15, /* Destination is an IPv6 link-local address. */
	REASON_MARTIAN = 16, /* An address no router forwards (unspecified, loopback, reserved, IPv4-mapped IPv6). */
	REASON_SLOT_MISSING = 17, /* The program a packet should go to next is not installed. */
	REASON_POLICY_DENIED = 32, /* A rule forbids it. */
	REASON_POLICY_DEFAULT = 33, /* No rule allows it, and rules select the endpoint. */
	REASON_POLICY_UNKNOWN = 34, /* The endpoint's policy is not in the kernel yet. */
	REASON_POLICY_LOCKDOWN = 35, /* The endpoint is in lockdown. */
	REASON_POLICY_REVOKED = 36, /* The connection was allowed once and no longer is. */
	REASON_POLICY_FRAGMENT = 37, /* A fragment whose first one was not seen. */
	REASON_POLICY_BROKEN = 38, /* The tables of a policy contradict themselves. */
	REASON_LB_NO_BACKEND = 64, /* The service has no backend now. */
	REASON_LB_SOURCE = 65, /* The client is outside the service's source ranges. */
	REASON_LB_NO_PORT = 66, /* All ports of the node towards this backend are in use. */
	REASON_LB_FRAGMENT = 67, /* A fragment whose first one was not seen. */
	REASON_LB_DSR_SOURCE = 68, /* An IP-in-IP packet that did not come from a node. */
	REASON_LB_TOO_BIG = 69, /* The packet does not fit the way to the backend. */
	REASON_LB_NO_ROUTE = 70, /* The node has no way to the backend. */
	REASON_LB_NAT_FULL = 71, /* The connection could not be recorded. */
	REASON_PREFILTER_DENIED = 72, /* The source is in a deny set of the prefilter. */
	REASON_PREFILTER_RATE = 73, /* The source sends more than its rate limit allows. */
	REASON_OVERLAY_IDENTITY = 96, /* The identity a packet carries is not that of its source address. */
	REASON_OVERLAY_SOURCE = 97, /* The packet came from another node than the one its source address belongs to. */
	REASON_OVERLAY_KEY = 98, /* A packet on the overlay device without tunnel information. */
	REASON_OVERLAY_DESTINATION = 99, /* A packet out of the overlay for an address that is neither a pod's nor the node's here. */
	REASON_UPLINK_SPOOFED = 100, /* A packet outside the overlay whose source address is reached through the overlay. */
	REASON_NODE_UNREACHABLE = 101, /* The destination's node is known but cannot be sent to. */
	REASON_REDIRECT = 102, /* The kernel refused to send the packet out. */
	REASON_OVERLAY_FORGED = 103, /* A pod sends to the overlay's port past the overlay: it could speak for others. */
	REASON_COUNT = 128, /* room, not a reason */
};
