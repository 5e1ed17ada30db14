"""Single fields of messages, checked. Each raises InvalidArgument that names the field by its path."""

from __future__ import annotations

import enum
import ipaddress
import re
import socket
from functools import lru_cache
from typing import Final, TypeVar

from services.common import errors
from services.common.pipeline.abi import IPAddress
from services.lb.model import IPNetwork

E = TypeVar("E", bound=enum.IntEnum)

TEXT_MAX: Final = 253
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,252}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_HAIRPIN: Final = {ipaddress.ip_address("169.254.42.1"), ipaddress.ip_address("fd00:fb:42::1")}
"""What a backend sees as its client when it has reached itself."""
_SPECIAL_V4: Final = (127, 169)
"""First bytes of addresses that may not be a single host's: loopback, and _HAIRPIN's."""


def shown(text: str) -> str:
    """For a message; long ones cut."""
    return repr(text if len(text) <= 60 else text[:60] + "…")


def name(value: str, at: str) -> str:
    """A service's name."""
    if not _NAME.fullmatch(value):
        what = f"{shown(value)} is no name of a service" if value else "the service has no name"
        raise errors.InvalidArgument(
            what,
            field=at,
            fix=f'use 1 to {TEXT_MAX} letters, digits and "-._/:", beginning with a letter or digit',
        )
    return value


def text(value: str, at: str) -> str:
    """Short printable text; may be empty."""
    if len(value) > TEXT_MAX or _CONTROL.search(value):
        raise errors.InvalidArgument(
            f"{shown(value)} is too long or has control characters",
            field=at,
            fix=f"use at most {TEXT_MAX} printable characters",
        )
    return value


def number(value: int, low: int, high: int, default: int, at: str) -> int:
    """Within bounds; 0 stands for the default."""
    if value == 0:
        return default
    if not low <= value <= high:
        raise errors.InvalidArgument(
            f"{value} is outside {low}..{high}", field=at, fix=f"give {low} to {high}, or 0 for {default}"
        )
    return value


def port(value: int, at: str) -> int:
    if not 1 <= value <= 65535:
        raise errors.InvalidArgument(f"{value} is no port", field=at, fix="give 1 to 65535")
    return value


def choice(kind: type[E], value: int, default: E, at: str) -> E:
    """A member; 0 stands for the default."""
    if value == 0:
        return default
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(f"{member.name} ({member.value})" for member in kind)
        raise errors.InvalidArgument(
            f"there is no value {value}", field=at, fix=f"use one of {known}"
        ) from None


def any_address(value: str, at: str) -> IPAddress:
    """An address as it is written, whatever it is for."""
    try:
        if "%" in value:
            raise ValueError
        found = ipaddress.ip_address(value)
    except ValueError:
        what = f"{shown(value)} is no address" if value else "there is no address"
        raise errors.InvalidArgument(what, field=at, fix='write "192.0.2.1" or "2001:db8::1"') from None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        raise errors.InvalidArgument(
            f"{value} is an IPv4 address in IPv6 notation", field=at, fix=f"write {found.ipv4_mapped}"
        )
    return found


def _host_v4(value: str) -> IPAddress | None:
    """The address if there is nothing wrong with it, as with nearly all of the hundreds of thousands there may be."""
    try:
        packed = socket.inet_pton(socket.AF_INET, value)
    except (OSError, ValueError):
        return None
    plain = 0 < packed[0] < 224 and packed[0] not in _SPECIAL_V4
    return ipaddress.IPv4Address(packed) if plain else None


@lru_cache(1 << 15)
def _host(value: str) -> IPAddress | None:
    """The same of both families; the same ones come again and again."""
    try:
        return _checked(value, "")
    except errors.InvalidArgument:
        return None


def address(value: str, at: str) -> IPAddress:
    """Of a single host that every node can mean the same by."""
    return _host_v4(value) or _host(value) or _checked(value, at)


def _checked(value: str, at: str) -> IPAddress:
    found = any_address(value, at)
    for wrong, why in (
        (found.is_unspecified, "stands for every address"),
        (found.is_multicast, "is a multicast address"),
        (found.is_loopback, "means another place on each node"),
        (found.version == 4 and int(found) == 0xFFFFFFFF, "is the broadcast address"),
        (found.version == 6 and found.is_link_local, "means another place on each link"),
        (found in _HAIRPIN, "is used by the data path for backends that reach themselves"),
    ):
        if wrong:
            raise errors.InvalidArgument(f"{found} {why}", field=at, fix="give the address of one host")
    return found


def network(value: str, at: str) -> IPNetwork:
    try:
        if "%" in value:
            raise ValueError("a prefix has no zone")
        loose = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise errors.InvalidArgument(
            f"{shown(value)} is no prefix", field=at, fix='write "10.0.0.0/8" or "fd00::/64"'
        ) from None
    if loose.version == 6 and loose.prefixlen >= 96 and loose.network_address.ipv4_mapped is not None:
        raise errors.InvalidArgument(
            f"{shown(value)} is an IPv4 prefix in IPv6 notation",
            field=at,
            fix=f"write {loose.network_address.ipv4_mapped}/{loose.prefixlen - 96}",
        )
    try:
        return ipaddress.ip_network(value)
    except ValueError:
        raise errors.InvalidArgument(
            f"{value} has bits set beyond its length", field=at, fix=f"write {loose}"
        ) from None


def at_most(count: int, limit: int, what: str, at: str) -> None:
    """A bound that is named when it is exceeded."""
    if count > limit:
        raise errors.InvalidArgument(f"{count} {what}", field=at, fix=f"give at most {limit}")
