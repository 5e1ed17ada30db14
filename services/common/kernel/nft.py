"""nftables rule sets, through libnftables (Debian: libnftables1, which comes with nftables).

A rule set is text in nft's language and applied in one transaction: all of it or nothing. Functions block and
work in the calling thread's network namespace: run them on the netlink thread.
"""

from __future__ import annotations

import ctypes as ct
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from services.common import errors


@functools.cache
def _library() -> Any:
    try:
        library = ct.CDLL("libnftables.so.1")
    except OSError:
        raise errors.FailedPrecondition(
            "libnftables.so.1 is missing", fix="apt-get install nftables"
        ) from None
    library.nft_ctx_new.restype = ct.c_void_p
    library.nft_ctx_new.argtypes = [ct.c_uint32]
    library.nft_ctx_free.argtypes = [ct.c_void_p]
    library.nft_ctx_buffer_output.argtypes = [ct.c_void_p]
    library.nft_ctx_buffer_error.argtypes = [ct.c_void_p]
    library.nft_ctx_get_output_buffer.argtypes = [ct.c_void_p]
    library.nft_ctx_get_output_buffer.restype = ct.c_char_p
    library.nft_ctx_get_error_buffer.argtypes = [ct.c_void_p]
    library.nft_ctx_get_error_buffer.restype = ct.c_char_p
    library.nft_run_cmd_from_buffer.argtypes = [ct.c_void_p, ct.c_char_p]
    return library


@contextmanager
def _context() -> Iterator[int]:
    context = _library().nft_ctx_new(0)
    if not context:
        raise errors.ResourceExhausted("no memory for an nftables context")
    try:
        _library().nft_ctx_buffer_output(context)
        _library().nft_ctx_buffer_error(context)
        yield context
    finally:
        _library().nft_ctx_free(context)


def _run(text: str) -> tuple[bool, str, str]:
    """(success, output, errors) of commands."""
    with _context() as context:
        failed = _library().nft_run_cmd_from_buffer(context, text.encode())
        output = _library().nft_ctx_get_output_buffer(context).decode(errors="replace")
        problem = _library().nft_ctx_get_error_buffer(context).decode(errors="replace")
    return not failed, output, problem


def apply(text: str) -> None:
    """Apply commands in one transaction.

    To replace a table, start with `table inet NAME {}` and `delete table inet NAME`. PermissionDenied, or
    FailedPrecondition with nft's own message and the line it marks.
    """
    done, _, problem = _run(text)
    if done:
        return
    if "Operation not permitted" in problem:
        raise errors.PermissionDenied(
            "may not change nftables rules", fix="run as root with CAP_NET_ADMIN in this network namespace"
        )
    raise errors.FailedPrecondition(f"nftables refused the rule set: {problem.strip()}")


def table(name: str, family: str = "inet") -> str | None:
    """The text of a table as `nft list table` prints it, None if there is none."""
    done, output, _ = _run(f"list table {family} {name}")
    return output if done else None


def delete_table(name: str, family: str = "inet") -> bool:
    """Delete a table with all it holds; whether it was there."""
    if table(name, family) is None:
        return False
    # Naming the table first makes this succeed if it vanished meanwhile.
    apply(f"table {family} {name} {{}}\ndelete table {family} {name}")
    return True
