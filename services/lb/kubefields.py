"""What of Kubernetes' objects is understood, and of what type it must be; all else is refused by its path.

Fields that say nothing about balancing (selectors, owners) are left aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from services.common.errors import InvalidArgument

SERVICE_NAME: Final = "kubernetes.io/service-name"
"""Label: whose slice it is."""
PROXY_NAME: Final = "service.kubernetes.io/service-proxy-name"
"""Label: another proxy than a cluster's usual one is to serve it."""
TOPOLOGY: Final = ("service.kubernetes.io/topology-mode", "service.kubernetes.io/topology-aware-hints")
"""Annotations that ask for a choice that is not made here."""


class Only(dict[str, Any]):
    """An object with no other fields than these."""


_ANY: Final = object
_META: Final = Only({
    "annotations": dict.fromkeys(TOPOLOGY, str), "creationTimestamp": _ANY, "deletionGracePeriodSeconds": _ANY,
    "deletionTimestamp": _ANY, "finalizers": _ANY, "generateName": _ANY, "generation": _ANY,
    "labels": {SERVICE_NAME: str, PROXY_NAME: str}, "managedFields": _ANY, "name": str, "namespace": str,
    "ownerReferences": _ANY, "resourceVersion": _ANY, "selfLink": _ANY, "uid": _ANY,
})  # fmt: skip
_PORTS: Final = [Only({"appProtocol": _ANY, "name": str, "port": _ANY, "protocol": str})]
_ADDRESSES: Final = [Only({"hostname": _ANY, "ip": str, "nodeName": str, "targetRef": _ANY})]
_OBJECT: Final = {"apiVersion": _ANY, "kind": _ANY, "metadata": _META}
# Numbers are checked where they are read.
SHAPES: Final[Mapping[str, Only]] = {
    "Service": Only({
        **_OBJECT,
        "spec": Only({
            "allocateLoadBalancerNodePorts": _ANY, "clusterIP": str, "clusterIPs": [str], "externalIPs": [str],
            "externalName": _ANY, "externalTrafficPolicy": str, "healthCheckNodePort": _ANY, "internalTrafficPolicy": str,
            "ipFamilies": [str], "ipFamilyPolicy": _ANY, "loadBalancerClass": _ANY, "loadBalancerIP": str,
            "loadBalancerSourceRanges": [str],
            "ports": [Only({**_PORTS[0], "nodePort": _ANY, "targetPort": _ANY})],
            "publishNotReadyAddresses": bool, "selector": _ANY, "sessionAffinity": str,
            "sessionAffinityConfig": Only({"clientIP": Only({"timeoutSeconds": _ANY})}), "trafficDistribution": str,
            "type": str,
        }),
        # What others have found out, and may say more of than is of interest here.
        "status": {"loadBalancer": {"ingress": [{"ip": str, "ipMode": str}]}},
    }),
    "EndpointSlice": Only({
        **_OBJECT,
        "addressType": str,
        "ports": _PORTS,
        "endpoints": [Only({
            "addresses": [str], "conditions": Only({"ready": bool, "serving": bool, "terminating": bool}),
            "deprecatedTopology": _ANY, "hints": _ANY, "hostname": _ANY, "nodeName": str, "targetRef": _ANY, "zone": str,
        })],
    }),
    "Endpoints": Only({
        **_OBJECT,
        "subsets": [Only({"addresses": _ADDRESSES, "notReadyAddresses": _ADDRESSES, "ports": _PORTS})],
    }),
}  # fmt: skip
LIST: Final = Only({"apiVersion": _ANY, "items": _ANY, "kind": _ANY, "metadata": _ANY})
_TYPES: Final = {str: "text", bool: "true or false"}


def check(value: Any, shape: Any, where: str) -> None:
    """Whether a document is as its shape; what is null is not there. InvalidArgument names the path."""
    if value is None:
        return
    if isinstance(shape, Mapping):
        given = mapping(value, where)
        if isinstance(shape, Only):
            for name in given:
                if name not in shape:
                    raise InvalidArgument(
                        f"{str(name)[:60]} is not supported", field=f"{where}.{str(name)[:60]}", fix="remove it, or ask for it"
                    )
        for key, inner in shape.items():
            check(given.get(key), inner, f"{where}.{key}")
    elif isinstance(shape, list):
        if not isinstance(value, list) or None in value:
            raise InvalidArgument("not a list of something", field=where)
        for at, item in enumerate(value):
            check(item, shape[0], f"{where}[{at}]")
    elif not isinstance(value, shape):
        raise InvalidArgument(f"{str(value)[:60]!r} is not {_TYPES[shape]}", field=where)


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """An object. InvalidArgument."""
    if not isinstance(value, Mapping):
        raise InvalidArgument("not an object", field=where)
    return value
