"""Whether a socket that is in a map of sockets may turn TLS of the kernel on: what bpf/sockaccel/ulp.h is for."""

from __future__ import annotations

import contextlib
import ctypes as ct
import errno
import functools
import os
import socket
from pathlib import Path
from typing import Final

from services.common.kernel import bpf
from services.sockaccel.tls import ktls

_MODULES: Final = Path("/proc/modules")
_PATIENCE_S: Final = 5.0


def possible() -> bool:
    """False: the kernel has no TLS and loads no modules, or refuses (the remedy of CVE-2026-93824). Blocks.

    A kernel with modules loads that one whenever a process asks that may (CAP_NET_ADMIN); until then nobody knows.
    """
    if not ktls.available():
        return _MODULES.exists()
    try:
        return _allowed()
    except OSError:
        return True


@functools.cache
def _allowed() -> bool:
    """Whether a connection of our own may. The kernel does not change its mind."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        made = stack.enter_context(socket.create_connection(listener.getsockname(), _PATIENCE_S))
        socks = bpf.map_create("sockmap", 4, 4, 1, name="fib_try")
        stack.callback(os.close, socks)
        key, value = ct.c_uint32(0), ct.c_uint32(made.fileno())
        bpf.map_elem(bpf.MAP_UPDATE, socks, ct.addressof(key), ct.addressof(value))
        try:
            ktls.turn_on(made, ktls.RX)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
    return True
