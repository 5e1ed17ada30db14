"""What is shown of an HTTP/1 message, and that nothing else ever is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sockaccel.tls.http import METHODS, is_secret, parse

REQUEST = b"GET /a/b?token=abc#x HTTP/1.1\r\nHost: h\r\nCookie: c=secret\r\nX-Kind: one\r\n\r\nbody"
ANSWER = b"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nSet-Cookie: secret\r\n\r\nbody"
SECRET = [
    "authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "x-auth-token", "private-token", "x-csrftoken",
    "authentication-info", "www-authenticate", "x-amz-security-token", "x-vault-token", "x-forwarded-client-cert", "apikey",
    "x-goog-api-key", "ocp-apim-subscription-key", "cf-access-client-secret", "x-session-id", "x-hub-signature-256", "dpop",
]  # fmt: skip


def test_the_first_line_is_shown_and_no_more() -> None:
    seen = parse(REQUEST)
    assert seen is not None and (seen.method, seen.path, seen.version) == ("GET", "/a/b?…", "HTTP/1.1")
    assert seen.status == 0 and seen.headers == {}
    seen = parse(REQUEST, query=True)
    assert seen is not None and seen.path == "/a/b?token=abc"
    seen = parse(ANSWER)
    assert seen is not None and (seen.status, seen.method, seen.path, seen.headers) == (404, "", "", {})


def test_headers_are_shown_that_are_named_and_hold_no_credentials() -> None:
    seen = parse(REQUEST, frozenset({"x-kind", "cookie", "absent"}))
    assert seen is not None and seen.headers == {"x-kind": "one"}
    seen = parse(ANSWER, frozenset({"content-type", "set-cookie"}))
    assert seen is not None and seen.headers == {"content-type": "text/plain"}


@pytest.mark.parametrize("name", SECRET)
def test_headers_that_may_hold_credentials_are_known(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["host", "user-agent", "content-type", "x-request-id", "idempotency-key", "etag", "location"])
def test_others_are_not_taken_for_them(name: str) -> None:
    assert not is_secret(name)


def test_a_url_in_a_header_is_cut_as_the_target_is() -> None:
    head = b"HTTP/1.1 302 Found\r\nLocation: https://user:word@host/back?code=secret#access=secret\r\n\r\n"
    seen = parse(head, frozenset({"location"}))
    assert seen is not None and seen.headers == {"location": "https://host/back?…"}
    seen = parse(head, frozenset({"location"}), query=True)
    assert seen is not None and seen.headers == {"location": "https://host/back?code=secret"}


def test_of_several_messages_in_one_the_first_is_shown() -> None:
    seen = parse(b"GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\nx-kind: of the second\r\n\r\n", frozenset({"x-kind"}))
    assert seen is not None and seen.path == "/1" and seen.headers == {}


@pytest.mark.parametrize(
    ("head", "path"),
    [
        (b"GET http://user:word@host/x?y HTTP/1.1\r\n", "http://host/x?…"),
        (b"CONNECT user:word@host:443 HTTP/1.1\r\n", "host:443"),
        (b"OPTIONS * HTTP/1.1\r\n", "*"),
        (b"GET /\xc3\xa4\x80 HTTP/1.0\r\n", "/%C3%A4%80"),
        (b"GET /#only HTTP/1.1\r\n", "/"),
    ],
)
def test_targets_of_all_forms(head: bytes, path: str) -> None:
    seen = parse(head)
    assert seen is not None and seen.path == path


@pytest.mark.parametrize(
    "head",
    [
        b"", b"GET / HTTP/1.1", b"GET / HTTP/1.1\n", b"GET  / HTTP/1.1\r\n", b"GET / HTTP/2\r\n", b"get / HTTP/1.1\r\n",
        b"GET /\x1b[31m HTTP/1.1\r\n", b"HTTP/1.1 99 x\r\n", b"HTTP/1.1 2000 x\r\n", b"POSTGRES secret\r\n",
        b"GET ? HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n",
    ],
)  # fmt: skip
def test_what_is_no_first_line_is_not_shown(head: bytes) -> None:
    assert parse(head) is None


def test_a_header_that_is_cut_off_is_not_shown() -> None:
    seen = parse(b"GET / HTTP/1.1\r\nx-kind: on", frozenset({"x-kind"}))
    assert seen is not None and seen.headers == {}


MARK = "q7Zk"


@given(
    st.binary(max_size=600),
    st.frozensets(st.sampled_from(["x-kind", "content-type", "authorization", "cookie"])),
    st.booleans(),
)
def test_any_bytes_are_taken(head: bytes, headers: frozenset[str], query: bool) -> None:
    seen = parse(head, headers, query)
    if seen is not None:
        assert seen.method in ("", *METHODS) and (seen.status > 0) != bool(seen.method)
        assert all(text.removesuffix("?…").isascii() and text.isprintable() for text in seen.headers.values())


@given(
    st.sampled_from(METHODS),
    st.lists(st.tuples(st.sampled_from(["Cookie", "Authorization", "X-Kind-2"]), st.text("abc", max_size=9)), max_size=5),
    st.sampled_from(SECRET),
)
def test_no_byte_of_what_is_not_named_is_ever_shown(method: str, rest: list[tuple[str, str]], secret: str) -> None:
    lines = "".join(f"{name}: {value}{MARK}\r\n" for name, value in [*rest, (secret, "x")])
    head = f"{method} /path?{MARK} HTTP/1.1\r\n{lines}X-Kind: shown\r\n\r\n{MARK}".encode()
    seen = parse(head, frozenset({"x-kind", secret}))
    assert seen is not None and seen.headers == {"x-kind": "shown"}
    assert MARK not in repr(seen)
