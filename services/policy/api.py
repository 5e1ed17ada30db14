"""PolicyService: fibril.policy.v1 to the store, the enforcer and the explainer and back."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

from fibril.policy.v1 import policy_pb2 as pb
from fibril.policy.v1 import policy_pb2_grpc
from fibril.types.v1 import types_pb2
from services.common import errors
from services.policy import abi, admission, convert, documents, named
from services.policy.answers import Answers
from services.policy.contents import HOST
from services.policy.diff import Differ
from services.policy.enforcer import Enforcer
from services.policy.kernel.connections import Connections
from services.policy.kernel.tables import CELL_LINES_MAX, Tables
from services.policy.model import Direction, Kind, Policy, PolicyKey
from services.policy.named import NamedPorts
from services.policy.sources import Sources
from services.policy.store import Store

PAGE_DEFAULT: Final = 1000
PAGE_MAX: Final = 10_000
UPSERT_MAX: Final = 100
TEXT_MAX: Final = 4 << 20

_RESULTS: Final = {
    "created": pb.APPLIED_RESULT_CREATED,
    "changed": pb.APPLIED_RESULT_CHANGED,
    "unchanged": pb.APPLIED_RESULT_UNCHANGED,
}


class PolicyApi(policy_pb2_grpc.PolicyServiceServicer):
    """One servicer for all servers of the process."""

    def __init__(
        self,
        store: Store,
        enforcer: Enforcer,
        sources: Sources,
        named_ports: NamedPorts,
        answers: Answers,
        differ: Differ,
        connections: Connections,
        tables: Callable[[], Tables | None],
        asked: Callable[[], Awaitable[None]],
    ) -> None:
        """asked: returns once packets are asked about."""
        self._store, self._enforcer, self._sources, self._named = store, enforcer, sources, named_ports
        self._answers, self._differ = answers, differ
        self._connections, self._tables, self._asked = connections, tables, asked

    # ---- policies -------------------------------------------------------------------------------------------
    async def UpsertPolicies(
        self, request: pb.UpsertPoliciesRequest, context: object
    ) -> pb.UpsertPoliciesResponse:
        policies = _distinct(request.policies)
        if request.expected_revision and len(policies) != 1:
            raise errors.InvalidArgument(
                "a revision is expected of several policies", field="expected_revision", fix="give one policy"
            )
        self._require_synced()
        self._store.require_room(policies)
        await admission.check(self._enforcer, policies)
        if request.dry_run:
            revision, result = 0, {policy.key: self._would(policy) for policy in policies}
        else:
            done, revision = await self._store.upsert(policies, request.expected_revision)
            result = dict(done)
        counts = list(result.values())
        return pb.UpsertPoliciesResponse(
            created=counts.count("created"),
            changed=counts.count("changed"),
            unchanged=counts.count("unchanged"),
            revision=revision,
        )

    async def DeletePolicies(
        self, request: pb.DeletePoliciesRequest, context: object
    ) -> pb.DeletePoliciesResponse:
        if not 1 <= len(request.keys) <= UPSERT_MAX:
            raise errors.InvalidArgument(
                f"{len(request.keys)} keys", field="keys", fix=f"give 1 to {UPSERT_MAX}"
            )
        keys = list(dict.fromkeys(convert.key(each, f"keys[{at}]") for at, each in enumerate(request.keys)))
        return pb.DeletePoliciesResponse(revision=await self._store.delete(keys))

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: object) -> pb.GetPolicyResponse:
        key = convert.key(request.key, "key")
        self._require_synced()
        if key not in self._store.policies:
            raise errors.NotFound(f"there is no {key}", field="key", fix="see: fibril policy ls")
        return pb.GetPolicyResponse(policy=self._shown(key))

    async def ListPolicies(self, request: pb.ListPoliciesRequest, context: object) -> pb.ListPoliciesResponse:
        size = _page_size(request.page)
        self._require_synced()
        after = _after(request.page.token)
        wanted = (
            key
            for key in self._store.policies
            if (after is None or key > after)
            and request.kind in (pb.POLICY_KIND_UNSPECIFIED, key.kind)
            and request.namespace in ("", key.namespace)
        )
        keys = heapq.nsmallest(size + 1, wanted)
        return pb.ListPoliciesResponse(
            policies=[self._shown(key) for key in keys[:size]],
            next_token=_token(keys[size - 1]) if len(keys) > size else "",
        )

    async def WatchPolicies(
        self, request: pb.WatchPoliciesRequest, context: object
    ) -> AsyncIterator[pb.WatchPoliciesResponse]:
        await self._store.synced.wait()
        async for change in self._store.feed.watch(request.after_revision):
            answer = pb.WatchPoliciesResponse(revision=change.revision)
            if change.item is None:
                answer.kind = types_pb2.WATCH_KIND_SYNCED
            elif change.item not in self._store.policies:
                answer.kind = types_pb2.WATCH_KIND_DELETE
                answer.policy.key.CopyFrom(convert.key_message(change.item))
            else:
                answer.kind = types_pb2.WATCH_KIND_PUT
                answer.policy.CopyFrom(self._shown(change.item))
            yield answer

    async def ApplyDocuments(
        self, request: pb.ApplyDocumentsRequest, context: object
    ) -> pb.ApplyDocumentsResponse:
        policies = await parse(request.text, request.default_namespace)
        self._require_synced()
        if request.delete:
            return await self._delete_documents(policies, request.dry_run)
        for policy in policies:
            self._store.require_room([policy])
        await admission.check(self._enforcer, policies)
        if request.dry_run:
            shown = [_applied(policy.key, _RESULTS[self._would(policy)]) for policy in policies]
            return pb.ApplyDocumentsResponse(documents=shown)
        answer = pb.ApplyDocumentsResponse()
        for part in self._store.parts(policies):
            result, answer.revision = await self._store.upsert(part)
            answer.documents.extend(_applied(key, _RESULTS[what]) for key, what in result.items())
        return answer

    async def _delete_documents(self, policies: Sequence[Policy], dry_run: bool) -> pb.ApplyDocumentsResponse:
        keys = [policy.key for policy in policies]
        for at, key in enumerate(keys):
            if key not in self._store.policies:
                raise errors.NotFound(f"there is no {key}", field=f"document {at + 1}", fix="see: fibril policy ls")
        answer = pb.ApplyDocumentsResponse()
        for at in range(0, 0 if dry_run else len(keys), UPSERT_MAX):
            answer.revision = await self._store.delete(keys[at : at + UPSERT_MAX])
        answer.documents.extend(_applied(key, pb.APPLIED_RESULT_DELETED) for key in keys)
        return answer

    def _would(self, policy: Policy) -> str:
        there = self._store.policies.get(policy.key)
        return "created" if there is None else "unchanged" if there == policy else "changed"

    def _shown(self, key: PolicyKey) -> pb.Policy:
        message = convert.policy_message(self._store.policies[key])
        message.revision = self._store.revisions[key]
        return message

    # ---- why ------------------------------------------------------------------------------------------------
    async def Trace(self, request: pb.TraceRequest, context: object) -> pb.TraceResponse:
        self._require_synced()
        return self._answers.trace(request)

    async def Why(self, request: pb.WhyRequest, context: object) -> pb.WhyResponse:
        return self._answers.why(request)

    async def Diff(self, request: pb.DiffRequest, context: object) -> pb.DiffResponse:
        policies = await parse(request.text, request.default_namespace) if request.text else []
        policies += _distinct(request.policies) if request.policies else []
        if not policies:
            raise errors.InvalidArgument("nothing is to be changed", field="text", fix="give documents or policies")
        self._require_synced()
        return await self._differ.diff(policies, request.delete, request.flows_seconds)

    # ---- endpoints ------------------------------------------------------------------------------------------
    async def ListEndpointPolicies(
        self, request: pb.ListEndpointPoliciesRequest, context: object
    ) -> pb.ListEndpointPoliciesResponse:
        size, after = _page_size(request.page), -1
        if request.page.token:
            after = _decimal(request.page.token)
            if after < 0:
                raise errors.InvalidArgument("that is no token of an earlier page", field="page.token")
        numbers = heapq.nsmallest(size + 1, (number for number in self._enforcer.endpoints if number > after))
        return pb.ListEndpointPoliciesResponse(
            endpoints=[self._endpoint(number) for number in numbers[:size]],
            next_token=str(numbers[size - 1]) if len(numbers) > size else "",
        )

    async def SetEndpointMode(
        self, request: pb.SetEndpointModeRequest, context: object
    ) -> pb.SetEndpointModeResponse:
        endpoint = self._require_endpoint(request.endpoint)
        flags = abi.EpFlag(self._enforcer.endpoints[endpoint].flags)
        if request.HasField("audit"):
            flags = _switched(flags, abi.EpFlag.AUDIT, request.audit)
        if request.HasField("lockdown"):
            flags = _switched(flags, abi.EpFlag.LOCKDOWN, request.lockdown)
        self._sources.set_flags(endpoint, flags)
        return pb.SetEndpointModeResponse(endpoint=self._endpoint(endpoint))

    async def SetNamedPorts(
        self, request: pb.SetNamedPortsRequest, context: object
    ) -> pb.SetNamedPortsResponse:
        ports = named.ports(request.ports, "ports")
        endpoint = self._require_endpoint(request.endpoint)
        if endpoint == HOST:
            raise errors.InvalidArgument("the host has no named ports", field="endpoint")
        await self._named.set(endpoint, ports)
        return pb.SetNamedPortsResponse(endpoint=self._endpoint(endpoint))

    def _require_endpoint(self, number: int) -> int:
        if number not in self._enforcer.endpoints:
            raise errors.NotFound(
                f"there is no endpoint {number} on this node", field="endpoint", fix="see: fibril endpoint ls"
            )
        return number

    def _endpoint(self, number: int) -> pb.EndpointPolicy:
        endpoint, content = self._enforcer.endpoints[number], self._enforcer.content_of(number)
        flags = abi.EpFlag(endpoint.flags)
        shown = pb.EndpointPolicy(
            endpoint=number,
            pod=endpoint.pod,
            identity=endpoint.identity,
            audit=bool(flags & abi.EpFlag.AUDIT),
            lockdown=bool(flags & abi.EpFlag.LOCKDOWN),
            named_ports=named.to_proto(endpoint.named),
        )
        if content is None or content.resolved is None or content.published is None:
            shown.message = content.problem if content is not None else ""
            shown.message = shown.message or self._enforcer.waiting or "its policy is being worked out"
            return shown
        resolved = content.resolved
        shown.policy, shown.generation = content.published.line, content.published.revision
        shown.ingress_enforced = resolved.enforced(Direction.INGRESS)
        shown.egress_enforced = resolved.enforced(Direction.EGRESS)
        shown.peers, shown.ports = len(resolved.classes), content.published.count
        shown.message = content.problem
        return shown

    async def WaitEnforced(self, request: pb.WaitEnforcedRequest, context: object) -> pb.WaitEnforcedResponse:
        await self._enforcer.wait(request.revision)
        await self._asked()
        problems = self._enforcer.contents.problems()
        if problems:
            raise errors.ResourceExhausted(f"not all is in force: {problems[0]}", fix="see: fibril policy endpoints")
        return pb.WaitEnforcedResponse(revision=self._enforcer.enforced)

    async def GetUsage(self, request: pb.GetUsageRequest, context: object) -> pb.GetUsageResponse:
        enforcer, tables, writer = self._enforcer, self._tables(), self._enforcer.writer
        policies = self._store.policies.values()
        usage = pb.GetUsageResponse(
            policies=len(self._store.policies),
            rules=sum(len(policy.rules) for policy in policies),
            selectors=len(enforcer.world.selectors),
            identities=len(enforcer.world.selectors.labels),
            endpoint_policies=len(enforcer.contents),
            peers_capacity=abi.PEERS_MAX,
            lines_capacity=CELL_LINES_MAX,
            prefixes_capacity=abi.PREFIXES_MAX,
            connections=self._connections.alive,
            connections_capacity=self._connections.capacity,
        )
        if writer is not None:
            usage.peers, usage.prefixes = writer.peers_used, writer.prefixes_used
            usage.lines = -(-writer.cells_used // abi.CELLS_A_LINE)
        if tables is not None:
            usage.events_lost = tables.stat(abi.Stat.LOST)
        return usage

    def _require_synced(self) -> None:
        if not self._store.synced.is_set():
            raise errors.Unavailable(
                "policies have not been read from etcd yet", fix="try again; see: fibril status"
            )


async def parse(text: str, default_namespace: str) -> list[Policy]:
    """Policies that documents declare."""
    if len(text) > TEXT_MAX:
        raise errors.InvalidArgument(
            f"{len(text)} characters of documents, the limit is {TEXT_MAX}", field="text", fix="apply them in parts"
        )
    # Large documents take seconds.
    return await asyncio.to_thread(_read, text, default_namespace or "default")


def _read(text: str, default_namespace: str) -> list[Policy]:
    found = documents.parse(text, default_namespace)
    return [convert.policy(each, f"document {at + 1}") for at, each in enumerate(found)]


def _distinct(messages: Sequence[pb.Policy]) -> list[Policy]:
    if not 1 <= len(messages) <= UPSERT_MAX:
        raise errors.InvalidArgument(f"{len(messages)} policies", field="policies", fix=f"give 1 to {UPSERT_MAX}")
    found: dict[PolicyKey, Policy] = {}
    for at, message in enumerate(messages):
        policy = convert.policy(message, f"policies[{at}]")
        convert.check_nodes(message, f"policies[{at}]")
        if policy.key in found:
            raise errors.InvalidArgument(
                f"{policy.key} is given twice", field=f"policies[{at}].key", fix="give each policy once"
            )
        found[policy.key] = policy
    return list(found.values())


def _switched(flags: abi.EpFlag, flag: abi.EpFlag, on: bool) -> abi.EpFlag:
    return flags | flag if on else flags & ~flag


def _applied(key: PolicyKey, result: pb.AppliedResult.ValueType) -> pb.AppliedDocument:
    return pb.AppliedDocument(key=convert.key_message(key), result=result)


def _page_size(page: types_pb2.PageRequest) -> int:
    if page.size > PAGE_MAX:
        raise errors.InvalidArgument(f"a page of {page.size} is larger than {PAGE_MAX}", field="page.size")
    return page.size or PAGE_DEFAULT


def _token(key: PolicyKey) -> str:
    return f"{int(key.kind)}/{key.namespace}/{key.name}"


def _after(token: str) -> PolicyKey | None:
    if not token:
        return None
    kind, *rest = token.split("/", 2)
    if len(rest) != 2 or _decimal(kind) not in Kind.__members__.values():
        raise errors.InvalidArgument("that is no token of an earlier page", field="page.token")
    return PolicyKey(Kind(int(kind)), *rest)


def _decimal(text: str) -> int:
    """A number of few plain digits; -1: it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
