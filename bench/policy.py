"""Policies on a node: milliseconds from a change to its being enforced, and what many identities and rules cost.

policy_apply_p99 is an upsert of a rule that concerns all 200 pods of a node, through gRPC, etcd and the watch, until
WaitEnforced says that the kernel has it; policy_apply_one_p99 one that concerns a single pod. policy_changes: of eight clients
at once, a second. Then with 10,000 identities,
given by the identity service, and 1,000 rules in force: policy_add_identity is from the answer of AllocateIdentity to the
new number's entry in the kernel; policy_resolve_all all of the policies' tables, worked out and written from nothing (by the
service's own code in this process); policy_pss the memory of the service's process.
"""

from __future__ import annotations

import asyncio
import ctypes as ct
import math
import random
import sys
import time
from collections.abc import Sequence

from bench.cnibase import Namespaces
from bench.common import Bench, log, median, quick
from bench.datapath import temporary_instance
from bench.node import Node, fill, node
from fibril.endpoint.v1 import endpoint_pb2, endpoint_pb2_grpc
from fibril.identity.v1 import identity_pb2, identity_pb2_grpc
from fibril.policy.v1 import policy_pb2 as pb
from fibril.policy.v1 import policy_pb2_grpc
from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.rpc.client import channel
from services.identity.numbers import Reserved, make
from services.policy import abi, install
from services.policy.contents import Endpoint
from services.policy.enforcer import Enforcer
from services.policy.kernel.tables import Tables
from services.policy.kernel.writer import Writer
from services.policy.model import (
    Action,
    Direction,
    EndpointPeer,
    Kind,
    Policy,
    PolicyKey,
    Port,
    Rule,
    Selector,
)
from services.policy.resolve.numbers import RuleNumbers
from services.policy.resolve.world import World

PODS = 200
IDENTITIES = quick(2000, 10_000)
RULES = quick(200, 1000)
SAMPLES = quick(30, 200)
APPS, TIERS, STAGES = 300, 10, 20
CHANGES, CLIENTS = quick(400, 2000), 8


def p99(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def labels(number: int) -> dict[str, str]:
    """Of an identity."""
    return {
        "app": f"a{number % APPS}",
        "tier": f"t{number % TIERS}",
        "stage": f"s{number % STAGES}",
        "number": str(number),
    }


def rule(number: int, rand: random.Random) -> tuple[dict[str, str], Sequence[dict[str, str]], Sequence[int]]:
    """Whom a rule is about, with which peers, on which ports."""
    peers = (
        {"app": f"a{rand.randrange(APPS)}"},
        {"tier": f"t{rand.randrange(TIERS)}", "stage": f"s{rand.randrange(STAGES)}"},
    )
    return {"app": f"a{number % APPS}"}, peers, sorted({rand.randrange(1, 60_000) for _ in range(2)})


def messages() -> list[pb.Policy]:
    """All rules, in policies of a hundred."""
    rand = random.Random(1)
    made = []
    for number in range(RULES):
        subject, peers, ports = rule(number, rand)
        if number % 100 == 0:
            made.append(pb.Policy(key=pb.PolicyKey(name=f"many{number // 100}")))
        made[-1].rules.add(
            subject=pb.LabelSelector(match_labels=subject),
            direction=pb.TRAFFIC_DIRECTION_INGRESS if number % 2 else pb.TRAFFIC_DIRECTION_EGRESS,
            action=pb.RULE_ACTION_ALLOW,
            peers=[pb.Peer(endpoints=pb.LabelSelector(match_labels=each)) for each in peers],
            ports=[pb.Port(protocol=pb.PORT_PROTOCOL_TCP, first=port) for port in ports],
            default_deny=True,
        )
    return made


def one_rule(name: str, subject: dict[str, str], port: int) -> pb.Policy:
    policy = pb.Policy(key=pb.PolicyKey(name=name))
    policy.rules.add(
        subject=pb.LabelSelector(match_labels=subject),
        direction=pb.TRAFFIC_DIRECTION_INGRESS,
        action=pb.RULE_ACTION_ALLOW,
        peers=[pb.Peer(endpoints=pb.LabelSelector(match_labels={"tier": "t1"}))],
        ports=[pb.Port(protocol=pb.PORT_PROTOCOL_TCP, first=port)],
        default_deny=True,
    )
    return policy


async def storm(stub: policy_pb2_grpc.PolicyServiceStub) -> float:
    """Changes a second from eight clients at once, each of a rule that concerns one pod, until the last is enforced."""

    async def client(number: int) -> int:
        revision = 0
        for at in range(CHANGES // CLIENTS):
            policy = one_rule(f"storm{number}-{at % 5}", {"pod": str(number * 5 + at % 5)}, 1000 + at)
            revision = (await stub.UpsertPolicies(pb.UpsertPoliciesRequest(policies=[policy]))).revision
        return revision

    began = time.perf_counter()
    last = max(await asyncio.gather(*(client(number) for number in range(CLIENTS))))
    await stub.WaitEnforced(pb.WaitEnforcedRequest(revision=last))
    took = time.perf_counter() - began
    names = [f"storm{number}-{at}" for number in range(CLIENTS) for at in range(5)]
    await stub.DeletePolicies(pb.DeletePoliciesRequest(keys=[pb.PolicyKey(name=name) for name in names]))
    return CHANGES / took


async def apply(stub: policy_pb2_grpc.PolicyServiceStub, name: str, subject: dict[str, str], port: int) -> float:
    """ms until a rule is enforced."""
    policy = one_rule(name, subject, port)
    began = time.perf_counter()
    answer = await stub.UpsertPolicies(pb.UpsertPoliciesRequest(policies=[policy]))
    await stub.WaitEnforced(pb.WaitEnforcedRequest(revision=answer.revision))
    return (time.perf_counter() - began) * 1000


async def changes(bench: Bench, fresh: Node) -> None:
    """Changes of rules, then many identities and rules."""
    run = fresh.root / "run" / fresh.name
    async with (
        channel(f"unix:{run / 'policy.sock'}") as to_policy,
        channel(f"unix:{run / 'identity.sock'}") as to_identity,
        channel(f"unix:{run / 'ipam.sock'}") as to_ipam,
    ):
        stub = policy_pb2_grpc.PolicyServiceStub(to_policy)
        endpoints = endpoint_pb2_grpc.EndpointServiceStub(to_ipam)
        listed = (await endpoints.ListEndpoints(endpoint_pb2.ListEndpointsRequest())).endpoints
        for number, endpoint in enumerate(listed):
            key = endpoint_pb2.EndpointKey(container_id=endpoint.container_id, ifname=endpoint.ifname)
            await endpoints.SetEndpointLabels(
                endpoint_pb2.SetEndpointLabelsRequest(key=key, labels={"pod": str(number), "app": f"a{number % APPS}"})
            )
        await asyncio.sleep(2)
        for name, subject in (("policy_apply_p99", {}), ("policy_apply_one_p99", {"pod": "7"})):
            found = [await apply(stub, name, subject, 1000 + at) for at in range(SAMPLES)]
            log(f"{name}: median {median(found):.1f} ms, of {len(found)}")
            bench.emit(name, "ms", p99(found), "target", 250.0 if subject == {} else 50.0)
        await stub.DeletePolicies(
            pb.DeletePoliciesRequest(keys=[pb.PolicyKey(name=name) for name in ("policy_apply_p99", "policy_apply_one_p99")])
        )
        bench.emit("policy_changes", "1/s", await storm(stub), "target", 200.0)
        identities = identity_pb2_grpc.IdentityServiceStub(to_identity)
        began = time.perf_counter()
        for at in range(0, IDENTITIES, 100):
            await asyncio.gather(
                *(
                    identities.AllocateIdentity(
                        identity_pb2.AllocateIdentityRequest(labels=labels(number), holder=f"bench-{number}")
                    )
                    for number in range(at, at + 100)
                )
            )
        log(f"{IDENTITIES} identities in {time.perf_counter() - began:.1f} s")
        for policy in messages():
            answer = await stub.UpsertPolicies(pb.UpsertPoliciesRequest(policies=[policy]))
        await stub.WaitEnforced(pb.WaitEnforcedRequest(revision=answer.revision))
        instance = Instance(fresh.name, fresh.root / "run", fresh.root / "state")
        with BpfMap.open(instance.pin_dir / abi.MAPS["pol_peers"], abi.Peer, ct.c_uint32) as peers:
            found = []
            for number in range(SAMPLES):
                request = identity_pb2.AllocateIdentityRequest(
                    labels=labels(IDENTITIES + number), holder=f"bench-new-{number}"
                )
                identity = (await identities.AllocateIdentity(request)).identity
                began = time.perf_counter()
                while peers.lookup(abi.Peer(abi.KNOWN, identity.number)) is None:  # noqa: ASYNC110, the kernel tells nobody
                    await asyncio.sleep(0.0002)
                found.append((time.perf_counter() - began) * 1000)
        bench.emit("policy_add_identity", "ms", median(found), "target", 5.0)
        bench.emit("policy_pss", "MB", fresh.pss_mb()["policy"], "target", 250.0)


def resolve_all() -> float:
    """Seconds to work out and write all policies of 200 pods."""
    rand = random.Random(1)
    with temporary_instance() as instance:
        asyncio.run(install.install_tables(instance))
        tables = Tables(instance, 131_072)
        writer, enforcer = Writer(tables), Enforcer(World(), RuleNumbers(), {})
        for reserved in Reserved:
            enforcer.add_identity(reserved, {reserved.label: ""})
        for number in range(IDENTITIES):
            enforcer.add_identity(make(1, number + 1), labels(number))
        for number in range(RULES):
            subject, peers, ports = rule(number, rand)
            made = Rule(
                Selector.of(subject), Direction(1 - number % 2), Action.ALLOW,
                tuple(EndpointPeer(Selector.of(each)) for each in peers), tuple(Port(6, port, port) for port in ports),
                default_deny=True,
            )  # fmt: skip
            key = PolicyKey(Kind.FIBRIL, "", f"p{number}")
            enforcer.set_policy(key, Policy(key, (made,)))
        for number in range(PODS):
            enforcer.set_endpoint(Endpoint(number + 1, 1000 + number, {"pod": str(number), "app": f"a{number % APPS}"}))
        enforcer.use(writer)
        enforcer.set_ready()
        began = time.perf_counter()
        asyncio.run(enforcer.flush(writer))
        took = time.perf_counter() - began
        tables.close()
    return took


def main() -> int:
    with Bench("policy") as bench:
        bench.emit("policy_resolve_all", "s", median([resolve_all() for _ in range(3)]), "target", 5.0)
        with node() as fresh, Namespaces() as spaces:
            fresh.fibril("up")
            asyncio.run(fill(fresh, [spaces.add() for _ in range(PODS)]))
            asyncio.run(changes(bench, fresh))
    return 0


if __name__ == "__main__":
    sys.exit(main())
