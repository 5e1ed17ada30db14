"""Whether policies would fit into the kernel's tables, before they are recorded anywhere.

Most are so small that no combination of them could fail; only what might is worked out.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Final

from services.common.errors import ResourceExhausted
from services.policy import abi
from services.policy.contents import Group
from services.policy.enforcer import Enforcer
from services.policy.model import CidrPeer, EndpointPeer, EntityPeer, Policy
from services.policy.resolve.numbers import ONLY_TRIED, RuleRef
from services.policy.resolve.resolved import CELLS_MAX, Resolved

_SURELY: Final = CELLS_MAX // 16
TRIES_MAX: Final = 5_000_000
"""New selectors times identities to try them on: some seconds."""


async def check(enforcer: Enforcer, policies: Sequence[Policy]) -> None:
    """Raises ResourceExhausted, with the count and the limit, if an endpoint of this node could not have these policies.
    Others have their turn between one endpoint's and the next.
    """
    tries = enforcer.world.selectors.tries(
        {
            peer
            for policy in policies
            for rule in policy.rules
            for peer in rule.peers or ()
            if isinstance(peer, EndpointPeer)
        }
    )
    if tries > TRIES_MAX:
        raise ResourceExhausted(
            f"selectors that demand no label's value would have to be tried {tries} times on identities, "
            f"the limit is {TRIES_MAX}",
            fix="have selectors name a label's value, or use fewer",
        )
    peers = 0
    seen = set()
    for group in list(enforcer.groups.values()):
        refs = _selected(enforcer, group, policies)
        if refs is None or _bound(enforcer, refs) <= _SURELY:
            continue
        alike = frozenset((ref.key, ref.index) for ref in refs), group.key[1]
        if alike in seen:
            continue
        seen.add(alike)
        await asyncio.sleep(0)
        resolved = Resolved(refs, dict(group.key[1]), enforcer.world)
        try:
            resolved.classify()
            resolved.tables()
            peers += len(resolved.classes)
        finally:
            resolved.close()
        prefixes = len(resolved.prefixes())
        if peers > abi.PEERS_MAX or prefixes > abi.PREFIXES_MAX:
            raise ResourceExhausted(
                f"{peers} peers and {prefixes} prefixes, the limits are {abi.PEERS_MAX} and {abi.PREFIXES_MAX}",
                fix="let policies select fewer peers, or use entities; join prefixes",
            )


def _selected(enforcer: Enforcer, group: Group, policies: Sequence[Policy]) -> list[RuleRef] | None:
    """Rules that would select a group; None if it is none of its business."""
    number = itertools.count(ONLY_TRIED)
    new = [
        RuleRef(policy.key, index, rule, next(number))
        for policy in policies
        for index, rule in enumerate(policy.rules)
        if rule.subject_is_node == group.key[2] and rule.subject.matches(group.labels)
    ]
    if not new:
        return None
    changed = {policy.key for policy in policies}
    return [ref for key, refs in group.refs.items() if key not in changed for ref in refs] + new


def _bound(enforcer: Enforcer, refs: Sequence[RuleRef]) -> int:
    """Cells at most."""
    identities = prefixes = ports = 0
    for ref in refs:
        peers = ref.rule.peers or ()
        identities += any(isinstance(peer, EndpointPeer | EntityPeer) for peer in peers)
        prefixes += sum(1 + len(peer.excepted) if isinstance(peer, CidrPeer) else 100 for peer in peers
                        if not isinstance(peer, EndpointPeer | EntityPeer))
        ports += 3 * len(ref.rule.ports or ())
    kinds = min(1 << min(identities, 30), len(enforcer.world.selectors.labels) + 1) + 1
    return 2 * kinds * (prefixes + 1) * (2 * ports + 2)
