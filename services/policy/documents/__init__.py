"""Policies as people have them: YAML and JSON of Kubernetes and Cilium."""

from fibril.policy.v1 import policy_pb2 as pb
from services.common.errors import Unimplemented


def parse(text: str, default_namespace: str) -> list[pb.Policy]:
    """Policies that documents declare."""
    raise Unimplemented("documents are not understood yet")
