from __future__ import annotations

from tests.interop.etcd.conftest import client, etcd, place

__all__ = ["client", "etcd", "place"]
