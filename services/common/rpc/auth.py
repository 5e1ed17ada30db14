"""Who may call what.

Unix socket: the kernel checks the peer's credentials when it connects, by the socket's mode 0660 and owner
root:fibril in a directory of mode 0750. gRPC's Python server does not hand out SO_PEERCRED, and needs not: a
process that is neither root nor in the group cannot connect, and one that can is a writer.

TCP: mutual TLS. A certificate of our authority has the role its subject's OU names ("fibril-reader" or
"fibril-writer"), or the last two parts of a URI SAN ("spiffe://any.domain/fibril/writer"). Readers may call
methods that only look (`required_role`); writers may call all. A certificate with neither role may call
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import lru_cache

from services.common.errors import PermissionDenied

_READING = ("Get", "List", "Watch", "Check")
# Methods that only look but are not named so; the first is gRPC's own.
_READING_METHODS = frozenset({"ServerReflectionInfo", "Whoami"})
# gRPC gives the subject in the form of RFC 2253: parts separated by "," or "+", which a backslash escapes
# inside a value. Without minding the escapes a common name of "x,OU=fibril-writer" would make its holder a
# writer.
_PART = re.compile(rb"(?:\\.|[^,+\\])+", re.DOTALL)
_OU = re.compile(rb"OU=fibril-(reader|writer)")
_SAN = re.compile(rb"[a-z][a-z0-9+.-]*://[^?#]*/fibril/(reader|writer)")


class Role(IntEnum):
    """What a peer may do; a higher role includes the lower."""

    NONE = 0
    READER = 1
    WRITER = 2


def required_role(method: str) -> Role:
    """The role a method ("/fibril.ipam.v1.IpamService/Allocate") asks for."""
    name = method.rpartition("/")[2]
    return Role.READER if name.startswith(_READING) or name in _READING_METHODS else Role.WRITER


def role_of(auth_context: Mapping[str, Sequence[bytes]]) -> Role:
    """The highest role the peer's verified certificate names; NONE without a certificate."""
    subject = auth_context.get("x509_subject", ())
    names = auth_context.get("x509_subject_alternative_name", ())
    return _role(tuple(subject), tuple(names))


@lru_cache(maxsize=256)
def _role(subject: tuple[bytes, ...], names: tuple[bytes, ...]) -> Role:
    parts = [part for text in subject for part in _PART.findall(text)]
    found = [match.group(1) for part in parts if (match := _OU.fullmatch(part))]
    found += [match.group(1) for name in names if (match := _SAN.fullmatch(name))]
    return max((Role[role.decode().upper()] for role in found), default=Role.NONE)


def check(method: str, auth_context: Mapping[str, Sequence[bytes]]) -> None:
    """Raise PermissionDenied unless the peer has the role `method` asks for."""
    needed = required_role(method)
    role = role_of(auth_context)
    if role >= needed:
        return
    common = auth_context.get("x509_common_name", [b"without a name"])[0].decode(errors="replace")
    raise PermissionDenied(
        f"certificate {common!r} has role {role.name.lower()}, {method} needs {needed.name.lower()}",
        fix=f"use a certificate whose OU is fibril-{needed.name.lower()}",
    )
