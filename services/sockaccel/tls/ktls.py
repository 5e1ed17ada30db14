"""TLS that the kernel does, seen before it encrypts (bpf/sockaccel/ktls.c).

    kernel = KernelTls(instance)
    await kernel.agree({(netns cookie, port), ...}, run)   look at connections of these; `problem` says why not

A socket is looked into if it was put in a map of sockets before its process turned TLS on, so this is about connections
made from now on. Programs, attachment and map live as long as their descriptors here: should the process be killed, the kernel
takes sockets out of the map and they go on as they were.

Kernels that were given the remedy of CVE-2026-93824 let no socket of a map turn TLS on. There a socket in the map would cost
its process what it wants, so before a pod's socket is put in, a connection of our own is tried.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import math
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.common import errors
from services.common.kernel import bpf, cgroup, progs
from services.common.kernel.maps import BpfMap
from services.common.kernel.netns import NetNs
from services.sockaccel.tls import programs

if TYPE_CHECKING:
    from services.common.instance import Instance

ABSENT: Final = "the kernel does no TLS: it has no such module, or nobody has loaded it (modprobe tls)"
REFUSED: Final = "this kernel lets no socket in a map of sockets turn TLS on (the remedy of CVE-2026-93824)"
_LAYERS: Final = Path("/proc/sys/net/ipv4/tcp_available_ulp")
_TCP_ULP, _SOL_TLS = 31, 282
TX, RX = 1, 2
_CRYPTO: Final = struct.pack("HH8s16s4s8s", 0x0304, 51, bytes(8), bytes(range(16)), bytes(4), bytes(8))
"""struct tls12_crypto_info_aes_gcm_128: TLS 1.3, cipher 51, with a key that protects nothing."""
_WORD: Final = b"GET /fibril HTTP/1.1\r\n\r\n"
_PATIENCE_S: Final = 5.0
_RETRY_S: Final = 30.0


class Refused(errors.FailedPrecondition):
    """This kernel will not, however often it is asked."""


class KernelTls:
    """At work while something is wanted."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._hooks: _Hooks | None = None
        self._wanted: set[tuple[int, int]] = set()
        self._not_before = 0.0
        self.problem = ""
        """Why nothing is seen of what is wanted; empty: it is seen."""

    @property
    def wanted(self) -> bool:
        return bool(self._wanted)

    async def agree(self, wanted: set[tuple[int, int]], run: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Be at work on connections of these (network namespace's cookie, server's port), and of no others.

        run: has it done by the one thread that may. What the kernel lacks is not an error: see `problem`.
        """
        self._wanted = wanted
        if not wanted:
            self._not_before = 0.0
        elif self._hooks is None and not available():
            self.problem = ABSENT
            return
        elif self._hooks is None and time.monotonic() < self._not_before:
            return
        try:
            if wanted and self._hooks is None:
                await programs.load_kernel(self._instance)
            await run(self._agree)
            self.problem = ""
        except (errors.FibrilError, OSError) as error:
            self.problem = str(error)
            self._not_before = math.inf if isinstance(error, Refused) else time.monotonic() + _RETRY_S

    def close(self) -> None:
        """The programs go."""
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None

    def _agree(self) -> None:
        if not self._wanted:
            self.close()
        elif self._hooks is not None:
            self._hooks.choose(self._wanted)
        else:
            hooks = _Hooks(self._instance)
            try:
                _try(hooks)
                hooks.choose(self._wanted)
            except BaseException:
                hooks.close()
                raise
            self._hooks = hooks


def available() -> bool:
    """Whether the kernel's TLS is there. It is not loaded for this: programs that can use it would begin to."""
    try:
        return "tls" in _LAYERS.read_text().split()
    except OSError:
        return False


def turn_on(end: socket.socket, way: int) -> None:
    """TLS of the kernel, with a key of ours, for what is written or read (TX, RX). OSError: the kernel refuses."""
    end.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
    end.setsockopt(_SOL_TLS, way, _CRYPTO)


class _Hooks:
    """The programs, attached."""

    def __init__(self, instance: Instance) -> None:
        """FailedPrecondition: the kernel refuses."""
        self._held: list[int] = []
        self._ports: BpfMap[programs.Port, ct.c_uint32] = BpfMap.open(
            instance.pin_dir / programs.MAPS["tls_ports"], programs.Port, ct.c_uint32
        )
        try:
            self._attach(instance)
        except OSError as error:
            self.close()
            raise errors.FailedPrecondition(f"a map of sockets cannot be watched: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def choose(self, wanted: set[tuple[int, int]]) -> None:
        there = {(int(key.netns), int(key.port)) for key in self._ports.keys()}  # noqa: SIM118 - it is no mapping
        for netns, port in there - wanted:
            self._ports.delete(programs.Port(netns, port))
        for netns, port in wanted - there:
            self._ports.update(programs.Port(netns, port), 1)

    def close(self) -> None:
        with contextlib.suppress(errors.FibrilError):
            self.choose(set())
        while self._held:
            os.close(self._held.pop())
        self._ports.close()

    def _attach(self, instance: Instance) -> None:
        ops, msg = (self._take(programs.path(instance, name)) for name in programs.KERNEL)
        socks = next(fd for fd in map(self._map, bpf.prog_info(ops).map_ids) if bpf.map_info(fd).type == "sockhash")
        bpf.call(bpf.PROG_ATTACH, struct.pack("IIIIIIQ", socks, msg, bpf.ATTACH_TYPES["sk_msg_verdict"], 0, 0, 0, 0))
        group = os.open(cgroup.mount_point(), os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._held.append(
                bpf.call(bpf.LINK_CREATE, struct.pack("IIII", ops, group, bpf.ATTACH_TYPES["cgroup_sock_ops"], 0))[0]
            )
        finally:
            os.close(group)

    def _take(self, path: Path) -> int:
        """A program, out of its pin."""
        fd = progs.open_prog(path)
        self._held.append(fd)
        path.unlink()
        return fd

    def _map(self, number: int) -> int:
        fd = bpf.call(bpf.MAP_FD_BY_ID, struct.pack("III", number, 0, 0))[0]
        self._held.append(fd)
        return fd


def _try(hooks: _Hooks) -> None:
    """That a connection that is looked at can turn TLS on, and gets through. Refused if not."""
    with NetNs.current() as own, contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(_PATIENCE_S)
        port = listener.getsockname()[1]
        hooks.choose({(own.cookie(), port)})
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port), _PATIENCE_S))
        server = stack.enter_context(listener.accept()[0])
        server.settimeout(_PATIENCE_S)
        try:
            turn_on(client, TX)
            turn_on(server, RX)
        except OSError:
            raise Refused(REFUSED) from None
        client.sendall(_WORD)
        if server.recv(len(_WORD), socket.MSG_WAITALL) != _WORD:
            raise Refused("TLS of a socket in a map of sockets does not get through")
