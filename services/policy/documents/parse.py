"""Documents to policies. Pure. What is not understood is refused by document and path, never left aside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Final

from fibril.policy.v1 import policy_pb2 as pb
from services.common import documents
from services.common.errors import InvalidArgument
from services.policy import convert
from services.policy.documents import cilium, kubernetes
from services.policy.documents.fields import Fields

Reader = Callable[[Fields, str], pb.Policy]
DOCUMENTS_MAX: Final = 10_000
VALUES_MAX: Final = 2_000_000
_KINDS: Final[dict[tuple[str, str], Reader]] = {
    ("networking.k8s.io", "NetworkPolicy"): kubernetes.network_policy,
    ("policy.networking.k8s.io", "AdminNetworkPolicy"): kubernetes.admin,
    ("policy.networking.k8s.io", "BaselineAdminNetworkPolicy"): kubernetes.baseline,
    ("policy.networking.k8s.io", "ClusterNetworkPolicy"): kubernetes.cluster,
    ("cilium.io", "CiliumNetworkPolicy"): cilium.namespaced,
    ("cilium.io", "CiliumClusterwideNetworkPolicy"): cilium.clusterwide,
}
_VERSIONS: Final = {
    ("networking.k8s.io", "NetworkPolicy"): ("v1",),
    ("policy.networking.k8s.io", "AdminNetworkPolicy"): ("v1alpha1",),
    ("policy.networking.k8s.io", "BaselineAdminNetworkPolicy"): ("v1alpha1",),
    ("policy.networking.k8s.io", "ClusterNetworkPolicy"): ("v1alpha2",),
    ("cilium.io", "CiliumNetworkPolicy"): ("v2",),
    ("cilium.io", "CiliumClusterwideNetworkPolicy"): ("v2",),
}


def parse(text: str, default_namespace: str) -> list[pb.Policy]:
    """Policies that YAML or JSON documents declare, in order. InvalidArgument names document, object and path."""
    found: list[pb.Policy] = []
    names: dict[bytes, str] = {}
    for where, document in _documents(text):
        policy = _policy(document, where, default_namespace)
        key = policy.key.SerializeToString(deterministic=True)
        if key in names:
            raise InvalidArgument(
                f"{where}: the same policy is in {names[key]}", field="metadata.name", fix="give each policy once"
            )
        names[key] = where
        found.append(policy)
    if not found:
        raise InvalidArgument("there is no policy in it", field="text", fix="give a document with apiVersion and kind")
    return found


def _documents(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for loaded in documents.read(text, "text", VALUES_MAX):
        for document in _items(loaded):
            number += 1
            if number > DOCUMENTS_MAX:
                raise InvalidArgument(f"more than {DOCUMENTS_MAX} documents", field="text", fix="apply them in parts")
            yield f"document {number}", document


def _items(loaded: Any) -> Iterator[dict[str, Any]]:
    """Lists are what is in them; empty documents are nothing."""
    if loaded is None:
        return
    if isinstance(loaded, dict) and str(loaded.get("kind", "")).endswith("List") and "items" in loaded:
        items = loaded["items"]
        if not isinstance(items, list):
            raise InvalidArgument("items of a List is no list", field="items")
        for item in items:
            yield from _items(item)
        return
    yield loaded


def _policy(document: Any, number: str, default_namespace: str) -> pb.Policy:
    fields = Fields(document, number, "")
    version, kind = document.get("apiVersion"), document.get("kind")
    group, _, api = str(version).partition("/")
    reader = _KINDS.get((group, str(kind)))
    if reader is None:
        raise InvalidArgument(
            f"{number}: kind {str(kind)[:60]!r} of {str(version)[:60]!r} is no policy",
            field="kind",
            fix=f"one of: {', '.join(name for _, name in _KINDS)}",
        )
    if api not in _VERSIONS[group, str(kind)]:
        raise InvalidArgument(
            f"{number}: {kind} of version {api[:60]!r} is not known",
            field="apiVersion",
            fix=f"{group}/{_VERSIONS[group, str(kind)][0]}",
        )
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    fields.where = f"{number}, {kind} {str(name)[:100]}"
    policy = reader(fields, default_namespace)
    policy.document = json.dumps(document, separators=(",", ":"), default=str)
    try:
        convert.policy(policy, "spec")
    except InvalidArgument as error:
        raise InvalidArgument(f"{fields.where}: {error.field}: {error.message}", field=error.field, fix=error.fix) from None
    return policy
