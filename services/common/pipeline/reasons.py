"""Drop reasons. Generated from bpf/abi/reasons.tsv; do not edit."""

from __future__ import annotations

import enum
from typing import Final


class Reason(enum.IntEnum):
    """Why the data path dropped a packet. Numbers as in fibril.types.v1.DropReason."""

    NONE = 0
    NO_ENDPOINT = 1
    SPOOFED_MAC = 2
    SPOOFED_IPV4 = 3
    SPOOFED_IPV6 = 4
    TRUNCATED = 5
    MALFORMED = 6
    EXT_HEADERS = 7
    VLAN = 8
    ETHERTYPE = 9
    ARP = 10
    NEIGHBOUR = 11
    BROADCAST = 12
    MULTICAST = 13
    WRONG_MAC = 14
    LINK_LOCAL = 15
    MARTIAN = 16
    SLOT_MISSING = 17
    POLICY_DENIED = 32
    POLICY_DEFAULT = 33
    POLICY_UNKNOWN = 34
    POLICY_LOCKDOWN = 35
    POLICY_REVOKED = 36
    POLICY_FRAGMENT = 37
    POLICY_BROKEN = 38
    LB_NO_BACKEND = 64
    LB_SOURCE = 65
    LB_NO_PORT = 66
    LB_FRAGMENT = 67
    LB_DSR_SOURCE = 68
    LB_TOO_BIG = 69
    LB_NO_ROUTE = 70
    LB_NAT_FULL = 71
    PREFILTER_DENIED = 72
    PREFILTER_RATE = 73
    OVERLAY_IDENTITY = 96
    OVERLAY_SOURCE = 97
    OVERLAY_KEY = 98
    OVERLAY_DESTINATION = 99
    UPLINK_SPOOFED = 100
    NODE_UNREACHABLE = 101
    REDIRECT = 102
    OVERLAY_FORGED = 103

    @property
    def label(self) -> str:
        """What metrics and people call it: "spoofed_mac"."""
        return self.name.lower()

    @property
    def text(self) -> str:
        """One sentence: what was wrong."""
        return TEXTS[self][0]

    @property
    def fix(self) -> str:
        """One sentence: what to do about it."""
        return TEXTS[self][1]


COUNT: Final = 128
"""Room in the counters' map; every reason's number is below."""

TEXTS: Final[dict[int, tuple[str, str]]] = {
    0: ("Not dropped.", ""),
    1: (
        "The interface has no entry in the endpoint map.",
        "Seen for a moment while a pod is removed; otherwise `fibril endpoint check`.",
    ),
    2: (
        "The source MAC is not the pod's.",
        "The pod changed its MAC, or bridges other machines' frames; neither is supported.",
    ),
    3: (
        "The IPv4 source is not the pod's address.",
        "The pod uses an address it was not given, or routes for others.",
    ),
    4: (
        "The IPv6 source is not the pod's address.",
        "As SPOOFED_IPV4; link-local sources count too, except in neighbour discovery.",
    ),
    5: (
        "The packet ends before its headers do.",
        "A broken sender.",
    ),
    6: (
        "A header field contradicts itself (IP version, header length).",
        "A broken sender.",
    ),
    7: (
        "More than six IPv6 extension headers.",
        "Such packets are never needed; look at the sender.",
    ),
    8: (
        "The pod sent a VLAN-tagged frame.",
        "Remove the VLAN device in the pod; pods are connected by IP, not by Ethernet.",
    ),
    9: (
        "Neither IPv4, IPv6 nor ARP.",
        "Pods are connected by IP only.",
    ),
    10: (
        "ARP that needs no answer: a reply, or about the pod's own address.",
        "None: neighbours are permanent entries, and requests for others are answered.",
    ),
    11: (
        "Neighbour discovery that needs no answer: advertisements, duplicate address detection.",
        "None: neighbours are permanent entries, and solicitations of others are answered.",
    ),
    12: (
        "Broadcast, DHCP included.",
        "Nothing broadcasts between pods; a pod's addresses are given to it, it must not ask by DHCP.",
    ),
    13: (
        "Multicast; also a pod's router solicitations and multicast listener reports.",
        "None for the latter two; applications need unicast.",
    ),
    14: (
        "A unicast frame for another MAC than the gateway's.",
        "The pod's neighbour entry for its gateway was changed; `fibril endpoint check`.",
    ),
    15: (
        "Destination is an IPv6 link-local address.",
        "Address the other pod by its pod address.",
    ),
    16: (
        "An address no router forwards (unspecified, loopback, reserved, IPv4-mapped IPv6).",
        "Look at the sender.",
    ),
    17: (
        "The program a packet should go to next is not installed.",
        "Restart the service that owns it; `fibril bpf` shows which slots are filled.",
    ),
    32: (
        "A rule forbids it.",
        "`fibril policy why` names the rule.",
    ),
    33: (
        "No rule allows it, and rules select the endpoint.",
        "`fibril policy why` names what was asked; add a rule that allows it.",
    ),
    34: (
        "The endpoint's policy is not in the kernel yet.",
        "Passes within moments of a pod's birth; otherwise `fibril status` says what the policy service lacks.",
    ),
    35: (
        "The endpoint is in lockdown.",
        "`fibril policy endpoint set ID --lockdown off`.",
    ),
    36: (
        "The connection was allowed once and no longer is.",
        "`fibril policy why` names the rule.",
    ),
    37: (
        "A fragment whose first one was not seen.",
        "Path MTU discovery avoids fragments; else look for reordering on the way.",
    ),
    38: (
        "The tables of a policy contradict themselves.",
        "Restart the policy service, which writes them anew; report this.",
    ),
    64: (
        "The service has no backend now.",
        "`fibril service get` shows its backends and their states; the client was told, unless the service says drop.",
    ),
    65: (
        "The client is outside the service's source ranges.",
        "Add the client's prefix to the service's source_ranges.",
    ),
    66: (
        "All ports of the node towards this backend are in use.",
        "More backends, more node addresses, or DSR (`fibril lb usage` names the backend).",
    ),
    67: (
        "A fragment whose first one was not seen.",
        "Path MTU discovery avoids fragments; else look for reordering before the node.",
    ),
    68: (
        "An IP-in-IP packet that did not come from a node.",
        "Somebody sends tunnel packets to a pod; only nodes' own are taken.",
    ),
    69: (
        "The packet does not fit the way to the backend.",
        "The client has been told the path MTU; look for filtered ICMP if it repeats.",
    ),
    70: (
        "The node has no way to the backend.",
        "`ip route get BACKEND` on the node; for pods `fibril node ls`.",
    ),
    71: (
        "The connection could not be recorded.",
        "`fibril lb usage` shows the table; it grows by itself up to its limit (lb.nat_max).",
    ),
    72: (
        "The source is in a deny set of the prefilter.",
        "`fibril prefilter get ADDRESS` names the entry.",
    ),
    73: (
        "The source sends more than its rate limit allows.",
        "`fibril prefilter get ADDRESS` names the limit.",
    ),
    96: (
        "The identity a packet carries is not that of its source address.",
        "Somebody else sends into the overlay, or a table is old: compare `fibril ipcache get ADDRESS` on both nodes.",
    ),
    97: (
        "The packet came from another node than the one its source address belongs to.",
        "As OVERLAY_IDENTITY; or a node sends from an address it is not registered with (`fibril node ls`).",
    ),
    98: (
        "A packet on the overlay device without tunnel information.",
        "Something on this host sends into the overlay device directly; it is the data path's only.",
    ),
    99: (
        "A packet out of the overlay for an address that is neither a pod's nor the node's here.",
        "Seen for a moment while a pod is removed; otherwise the sender's table is old.",
    ),
    100: (
        "A packet outside the overlay whose source address is reached through the overlay.",
        "Somebody uses a pod's address, or the nodes have different modes (`fibril node ls`).",
    ),
    101: (
        "The destination's node is known but cannot be sent to.",
        "`fibril node get NODE` says what is wrong.",
    ),
    102: (
        "The kernel refused to send the packet out.",
        "The overlay device or the uplink is missing or down; `fibril status` names it.",
    ),
    103: (
        "A pod sends to the overlay's port past the overlay: it could speak for others.",
        "Let the pod use another UDP port, or give the overlay one of its own (`network.overlay_port`).",
    ),
}
