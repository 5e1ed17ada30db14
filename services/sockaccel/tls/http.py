"""The first line and the chosen headers of an HTTP/1 message (RFC 9112), and nothing else of it.

Whatever is not certain to be a first line is not shown: what was copied from a process may be anything.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

METHODS: Final = ("GET", "POST", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE")
_SECRET: Final = re.compile(
    "auth|cookie|token|secret|passw|passphrase|credential|session|signature|nonce|csrf|xsrf|jwt|saml|otp|client-cert"
    "|(api|access|private|subscription|encryption|master|customer|license)-?key|^key$|^dpop$"
)
VALUE_MAX: Final = 256
PREFACE: Final = b"PRI * HTTP/2.0\r\n"
"""How a connection of HTTP/2 begins."""
_REQUEST: Final = re.compile(rb"(%s) ([!-~\x80-\xff]+) (HTTP/1\.[01])" % "|".join(METHODS).encode())
_ANSWER: Final = re.compile(rb"(HTTP/1\.[01]) ([1-5][0-9][0-9])(?: [^\r\n]*)?")
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n]*?)[ \t]*")
_USER: Final = re.compile(rb"//[^/@\s]*@")
_SAFE: Final = "/?#[]@!$&'()*+,;=:-._~%|"


@dataclass(frozen=True)
class Seen:
    """What is shown of a message: of a request method and path, of an answer the status."""

    version: str
    method: str = ""
    path: str = ""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)


def is_secret(header: str) -> bool:
    """Whether a header, in lower case, may hold credentials: then it is never shown."""
    return _SECRET.search(header) is not None


def parse(head: bytes, headers: Set[str] = frozenset(), query: bool = False) -> Seen | None:
    """The beginning of a message, or None if it is none or its first line is not all there.

    headers: those that are shown, in lower case. query: show what follows "?".
    """
    first, end, rest = head.partition(b"\r\n")
    if not end:
        return None
    if found := _REQUEST.fullmatch(first):
        method, target, version = found[1].decode(), found[2], found[3].decode()
        path = _target(target, query)
        return Seen(version, method, path, headers=_headers(rest, headers, query)) if path is not None else None
    if found := _ANSWER.fullmatch(first):
        return Seen(found[1].decode(), status=int(found[2]), headers=_headers(rest, headers, query))
    return None


def _target(target: bytes, query: bool) -> str | None:
    """A request's target without user, fragment and, unless wanted, query."""
    target = target.partition(b"#")[0]
    scheme, is_absolute, rest = target.partition(b"://")
    if is_absolute and b"/" not in scheme and b"?" not in scheme:
        # What precedes "@" in the authority may be a password.
        authority, slash, path = rest.partition(b"/")
        target = scheme + b"://" + authority.rpartition(b"@")[2] + slash + path
    elif not target.startswith(b"/") and target != b"*":
        # CONNECT names an authority.
        target = target.rpartition(b"@")[2]
    path, mark, _ = target.partition(b"?")
    if mark and not query:
        return quote(path, safe=_SAFE) + "?…" if path else None
    return quote(target, safe=_SAFE) or None


def _headers(rest: bytes, wanted: Set[str], query: bool) -> dict[str, str]:
    """Only lines that are all there; control characters and what is not ASCII are escaped.

    A value may be a URL (Location, Referer), or have one in it: what a target would not show is left out of it as well.
    """
    found: dict[str, str] = {}
    if not wanted:
        return found
    lines = rest.split(b"\r\n")
    for line in lines[:-1]:
        if not line:
            break
        match = _HEADER.fullmatch(line)
        if match is None:
            break
        name = match[1].decode().lower()
        if name in wanted and not is_secret(name):
            value = _USER.sub(b"//", match[2].partition(b"#")[0])
            value, mark, _ = value.partition(b"?") if not query else (value, b"", b"")
            text = value[:VALUE_MAX].decode("ascii", "backslashreplace").encode("unicode_escape").decode()
            found[name] = text + ("?…" if mark else "")
    return found
