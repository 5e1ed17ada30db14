"""The pods of a node by number, cgroup and namespace, against a plain model."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fibril.endpoint.v1 import endpoint_pb2 as ep
from services.identity.workload.endpoints import EndpointView

NUMBERS, KEYS = st.integers(1, 5), st.integers(0, 3)


class Views(RuleBasedStateMachine):
    """Any sequence of changes, with streams that break and begin anew."""

    def __init__(self) -> None:
        super().__init__()
        self.view = EndpointView()
        self.model: dict[int, ep.Endpoint] = {}
        self.unconfirmed: set[int] = set()

    @rule(number=NUMBERS, cgroup=KEYS, netns=KEYS)
    def put(self, number: int, cgroup: int, netns: int) -> None:
        self.model[number] = ep.Endpoint(id=number, cgroup_id=cgroup, netns_cookie=netns)
        self.unconfirmed.discard(number)
        self.view.put(self.model[number])

    @rule(number=NUMBERS)
    def delete(self, number: int) -> None:
        self.model.pop(number, None)
        self.unconfirmed.discard(number)
        self.view.delete(number)

    @rule()
    def restart(self) -> None:
        self.unconfirmed = set(self.model)
        self.view.restart()

    @rule()
    def synced(self) -> None:
        for number in self.unconfirmed:
            del self.model[number]
        self.unconfirmed = set()
        self.view.synced()
        assert self.view.known

    @invariant()
    def agrees(self) -> None:
        for number in range(1, 6):
            assert self.view.by_id(number) == self.model.get(number)
        for key in range(4):
            for find, field in ((self.view.by_cgroup, "cgroup_id"), (self.view.by_netns, "netns_cookie")):
                found = [n for n, e in self.model.items() if key and getattr(e, field) == key]
                assert find(key) == (self.model[min(found)] if found else None)


TestViews = Views.TestCase
