"""Policies as people have them: YAML and JSON of Kubernetes and Cilium."""

from services.policy.documents.parse import parse

__all__ = ["parse"]
