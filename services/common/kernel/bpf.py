"""The bpf(2) system call, a function a command.

No library is needed for these, and the newest commands (tcx, netns-wide queries) are not in Debian 12's
libbpf 1.1. Every function raises OSError with the kernel's errno; the modules above turn that into the typed
errors of `services.common.errors`. This module imports nothing heavy: the loader process uses it too.
Structures follow `union bpf_attr` in include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_NR_BPF: Final = {"x86_64": 321, "aarch64": 280}.get(os.uname().machine, 321)

MAP_CREATE = 0
MAP_LOOKUP = 1
MAP_UPDATE = 2
MAP_DELETE = 3
MAP_NEXT_KEY = 4
PROG_LOAD = 5
OBJ_PIN = 6
OBJ_GET = 7
PROG_ATTACH = 8
PROG_DETACH = 9
PROG_TEST_RUN = 10
PROG_NEXT_ID = 11
MAP_NEXT_ID = 12
PROG_FD_BY_ID = 13
MAP_FD_BY_ID = 14
INFO_BY_FD = 15
PROG_QUERY = 16
RAW_TRACEPOINT_OPEN = 17
BTF_LOAD, BTF_FD_BY_ID = 18, 19
MAP_LOOKUP_BATCH, MAP_UPDATE_BATCH, MAP_DELETE_BATCH = 24, 26, 27
LINK_CREATE, ENABLE_STATS = 28, 32

# fmt: off
MAP_TYPES: Final = (
    "unspec", "hash", "array", "prog_array", "perf_event_array", "percpu_hash", "percpu_array",
    "stack_trace", "cgroup_array", "lru_hash", "lru_percpu_hash", "lpm_trie", "array_of_maps",
    "hash_of_maps", "devmap", "sockmap", "cpumap", "xskmap", "sockhash", "cgroup_storage",
    "reuseport_sockarray", "percpu_cgroup_storage", "queue", "stack", "sk_storage", "devmap_hash",
    "struct_ops", "ringbuf", "inode_storage", "task_storage", "bloom_filter", "user_ringbuf",
    "cgrp_storage", "arena",
)
# fmt: on
PERCPU_TYPES: Final = frozenset({"percpu_hash", "percpu_array", "lru_percpu_hash", "percpu_cgroup_storage"})
# fmt: off
PROG_TYPES: Final = (
    "unspec", "socket_filter", "kprobe", "sched_cls", "sched_act", "tracepoint", "xdp", "perf_event",
    "cgroup_skb", "cgroup_sock", "lwt_in", "lwt_out", "lwt_xmit", "sock_ops", "sk_skb", "cgroup_device",
    "sk_msg", "raw_tracepoint", "cgroup_sock_addr", "lwt_seg6local", "lirc_mode2", "sk_reuseport",
    "flow_dissector", "cgroup_sysctl", "raw_tracepoint_writable", "cgroup_sockopt", "tracing",
    "struct_ops", "ext", "lsm", "sk_lookup", "syscall", "netfilter",
)
# fmt: on

# Attach types used here, by the name a ProgramSpec gives (enum bpf_attach_type).
ATTACH_TYPES: Final = {
    "cgroup_inet_ingress": 0,
    "cgroup_inet_egress": 1,
    "cgroup_inet_sock_create": 2,
    "cgroup_sock_ops": 3,
    "sk_skb_stream_parser": 4,
    "sk_skb_stream_verdict": 5,
    "sk_msg_verdict": 7,
    "cgroup_inet4_connect": 10,
    "cgroup_inet6_connect": 11,
    "cgroup_udp4_sendmsg": 14,
    "cgroup_udp6_sendmsg": 15,
    "cgroup_udp4_recvmsg": 19,
    "cgroup_udp6_recvmsg": 20,
    "cgroup_setsockopt": 22,
    "trace_raw_tp": 23,
    "cgroup_inet4_getpeername": 29,
    "cgroup_inet6_getpeername": 30,
    "cgroup_inet_sock_release": 34,
    "tcx_ingress": 46,
    "tcx_egress": 47,
}

ANY, NOEXIST, EXIST = 0, 1, 2
F_ALLOW_MULTI: Final = 1 << 1
F_REPLACE: Final = 1 << 2

_BPFFS_MAGIC: Final = 0xCAFE4A11

_libc = ct.CDLL(None, use_errno=True)
_libc.statfs.argtypes = [ct.c_char_p, ct.c_void_p]
_syscall = _libc.syscall
_syscall.restype = ct.c_long
_syscall.argtypes = [ct.c_long, ct.c_int, ct.c_void_p, ct.c_uint]


def call(cmd: int, attr: bytes, what: str = "") -> tuple[int, bytes]:
    """bpf(cmd, attr): (return value, attr as the kernel left it). OSError names `what`."""
    buffer = ct.create_string_buffer(attr, len(attr))
    result = _syscall(_NR_BPF, cmd, ct.addressof(buffer), len(attr))
    if result < 0:
        number = ct.get_errno()
        raise OSError(number, os.strerror(number), what or None)
    return result, buffer.raw


def possible_cpus() -> int:
    """How many values a per-CPU map element has (possible CPUs, not online ones)."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")[-1]
    return int(last.split("-")[-1]) + 1


def is_bpffs(path: Path | str) -> bool:
    """Whether `path` lies on a mounted bpf file system."""
    answer = ct.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), answer) < 0:
        return False
    return int(struct.unpack_from("q", answer.raw)[0]) & 0xFFFFFFFF == _BPFFS_MAGIC


def pin(fd: int, path: str) -> None:
    """Pin a map or program at `path` on a bpffs. A '.' in the name is refused by the kernel (EPERM)."""
    name = ct.create_string_buffer(os.fsencode(path))
    call(OBJ_PIN, struct.pack("QII", ct.addressof(name), fd, 0), path)


def get(path: str) -> int:
    """A new file descriptor of the object pinned at `path` (ENOENT if none)."""
    name = ct.create_string_buffer(os.fsencode(path))
    return call(OBJ_GET, struct.pack("QII", ct.addressof(name), 0, 0), path)[0]


@dataclass(frozen=True)
class MapInfo:
    """bpf_map_info. Sizes in bytes; `type` as in MAP_TYPES."""

    type: str
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str

    def shape(self) -> str:
        """What must agree before a pinned map may be adopted, for messages."""
        return (
            f"{self.type}, key {self.key_size} bytes, value {self.value_size} bytes, "
            f"{self.max_entries} entries, flags {self.flags:#x}"
        )


@dataclass(frozen=True)
class ProgInfo:
    """bpf_prog_info. run_time_ns and run_cnt count only while statistics are enabled."""

    type: str
    id: int
    tag: str
    name: str
    load_time_ns: int
    jited_bytes: int
    xlated_bytes: int
    run_time_ns: int
    run_cnt: int
    map_ids: tuple[int, ...]
    verified_insns: int


def _info(fd: int, size: int) -> tuple[ct.Array[ct.c_char], bytes]:
    out = ct.create_string_buffer(size)
    call(INFO_BY_FD, struct.pack("IIQ", fd, size, ct.addressof(out)), "object info")
    return out, out.raw


def map_info(fd: int) -> MapInfo:
    _, raw = _info(fd, 88)
    kind, ident, key, value, entries, flags = struct.unpack_from("6I", raw)
    return MapInfo(
        MAP_TYPES[kind] if kind < len(MAP_TYPES) else str(kind),
        ident,
        key,
        value,
        entries,
        flags,
        raw[24:40].split(b"\0")[0].decode(),
    )


def prog_info(fd: int) -> ProgInfo:
    size = 232
    _, raw = _info(fd, size)
    count = struct.unpack_from("I", raw, 52)[0]
    ids: tuple[int, ...] = ()
    if count:
        array = (ct.c_uint32 * count)()
        request = ct.create_string_buffer(size)
        struct.pack_into("I", request, 52, count)
        struct.pack_into("Q", request, 56, ct.addressof(array))
        call(INFO_BY_FD, struct.pack("IIQ", fd, size, ct.addressof(request)), "program info")
        ids = tuple(array[: min(count, struct.unpack_from("I", request.raw, 52)[0])])
    kind, ident = struct.unpack_from("II", raw)
    jited, xlated = struct.unpack_from("II", raw, 16)
    return ProgInfo(
        type=PROG_TYPES[kind] if kind < len(PROG_TYPES) else str(kind),
        id=ident,
        tag=raw[8:16].hex(),
        name=raw[64:80].split(b"\0")[0].decode(),
        load_time_ns=struct.unpack_from("Q", raw, 40)[0],
        jited_bytes=jited,
        xlated_bytes=xlated,
        run_time_ns=struct.unpack_from("Q", raw, 192)[0],
        run_cnt=struct.unpack_from("Q", raw, 200)[0],
        map_ids=ids,
        verified_insns=struct.unpack_from("I", raw, 216)[0],
    )


def map_create(
    kind: str,
    key_size: int,
    value_size: int,
    max_entries: int,
    flags: int = 0,
    name: str = "",
    inner_fd: int = 0,
    types: tuple[int, int, int] = (0, 0, 0),
) -> int:
    """A new map's descriptor. `name` is cut to 15 characters.

    types: a descriptor of type information, and the numbers of key and value in it.
    """
    return call(
        MAP_CREATE,
        struct.pack(
            "7I16s5I",
            MAP_TYPES.index(kind),
            key_size,
            value_size,
            max_entries,
            flags,
            inner_fd,
            0,
            name.encode()[:15],
            0,
            *types,
            0,
        ),
        f"map {name}",
    )[0]


def map_types(fd: int) -> tuple[int, int, int]:
    """Id of a map's type information, numbers of key and value in it."""
    _, raw = _info(fd, 88)
    found: tuple[int, int, int] = struct.unpack_from("III", raw, 64)
    return found


def btf_raw(ident: int) -> bytes:
    """Type information that the kernel holds."""
    fd = call(BTF_FD_BY_ID, struct.pack("I", ident), f"type information {ident}")[0]
    try:
        out = ct.create_string_buffer(1 << 20)
        info = ct.create_string_buffer(struct.pack("QI", ct.addressof(out), len(out)), 32)
        call(INFO_BY_FD, struct.pack("IIQ", fd, 32, ct.addressof(info)), "type information")
        return out.raw[: struct.unpack_from("I", info.raw, 8)[0]]
    finally:
        os.close(fd)


def btf_load(raw: bytes) -> int:
    """A descriptor of type information."""
    data = ct.create_string_buffer(raw, len(raw))
    return call(BTF_LOAD, struct.pack("QQIIII", ct.addressof(data), 0, len(raw), 0, 0, 0), "type information")[0]


def map_elem(cmd: int, fd: int, key: int, value: int, flags: int = 0) -> None:
    """LOOKUP, UPDATE, DELETE or NEXT_KEY; `key` and `value` are addresses of ctypes objects."""
    buffer = struct.pack("IIQQQ", fd, 0, key, value, flags)
    if _syscall(_NR_BPF, cmd, buffer, 32) < 0:
        number = ct.get_errno()
        raise OSError(number, os.strerror(number))


def map_batch(
    cmd: int,
    fd: int,
    count: int,
    keys: int,
    values: int,
    in_batch: int = 0,
    out_batch: int = 0,
    elem_flags: int = 0,
) -> tuple[int, int]:
    """A batch command: (elements done, errno or 0). A partly done batch is not an exception."""
    buffer = ct.create_string_buffer(
        struct.pack("QQQQIIQQ", in_batch, out_batch, keys, values, count, fd, elem_flags, 0), 56
    )
    if _syscall(_NR_BPF, cmd, ct.addressof(buffer), 56) < 0:
        return struct.unpack_from("I", buffer.raw, 32)[0], ct.get_errno()
    return struct.unpack_from("I", buffer.raw, 32)[0], 0


class Refused(OSError):
    """The verifier would not have it; `log` says why."""

    log = ""


def prog_load(kind: str, code: bytes, name: str, attach_type: int = 0, btf_id: int = 0) -> int:
    """Load instructions as they are (license GPL); the descriptor. `btf_id`: type of the kernel's that it is attached to.

    Refused: with the verifier's words.
    """
    instructions, licence = ct.create_string_buffer(code, len(code)), ct.create_string_buffer(b"GPL")
    # Words cost time, so they are asked for only when it has been refused.
    for size in (0, 1 << 24):
        log = ct.create_string_buffer(size or 1)
        attr = _load_attr(kind, code, name, attach_type, btf_id, instructions, licence, log if size else None)
        try:
            return call(PROG_LOAD, attr, f"program {name}")[0]
        except OSError as error:
            refused = Refused(*error.args)
            refused.log = log.value.decode(errors="replace")
            if error.errno == errno.EPERM:
                break
    raise refused


def _load_attr(
    kind: str, code: bytes, name: str, attach_type: int, btf_id: int, instructions: Any, licence: Any, log: Any
) -> bytes:
    return struct.pack(
        "IIQQIIQII16sIIIIQIIQIII",
        PROG_TYPES.index(kind),
        len(code) // 8,
        ct.addressof(instructions),
        ct.addressof(licence),
        1 if log is not None else 0,
        len(log) if log is not None else 0,
        ct.addressof(log) if log is not None else 0,
        0,
        0,
        name.encode()[:15],
        0,
        attach_type,
        *[0] * 7,
        btf_id,
        0,
    )


def prog_fd_by_id(ident: int) -> int:
    return call(PROG_FD_BY_ID, struct.pack("III", ident, 0, 0), f"program {ident}")[0]


def map_fd_by_id(ident: int) -> int:
    return call(MAP_FD_BY_ID, struct.pack("III", ident, 0, 0), f"map {ident}")[0]


def slot_get(array: int, index: int) -> int:
    """Id of the program in a slot of a program array, 0 if the slot is empty."""
    key, value = ct.c_uint32(index), ct.c_uint32()
    try:
        map_elem(MAP_LOOKUP, array, ct.addressof(key), ct.addressof(value))
    except FileNotFoundError:
        return 0
    return value.value


def slot_set(array: int, index: int, fd: int) -> None:
    """Install a program; atomic for packets.

    EINVAL: the array holds another kind of program; E2BIG: no such slot.
    """
    key, value = ct.c_uint32(index), ct.c_uint32(fd)
    map_elem(MAP_UPDATE, array, ct.addressof(key), ct.addressof(value))


def slot_clear(array: int, index: int) -> None:
    """Empty a slot; an empty one is fine."""
    key = ct.c_uint32(index)
    try:
        map_elem(MAP_DELETE, array, ct.addressof(key), 0)
    except FileNotFoundError:
        pass
