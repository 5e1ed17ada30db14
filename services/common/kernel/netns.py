"""Network namespaces: check, identify and enter them.

Entering changes the calling thread only, so it happens on the netlink thread (`netlink.Netlink`), which
always returns to the node's own namespace. A socket made inside stays inside, whoever uses it later.
"""

from __future__ import annotations

import ctypes as ct
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

from services.common import errors

CLONE_NEWNET: Final = 0x40000000
NSFS_MAGIC: Final = 0x6E736673
NS_GET_NSTYPE: Final = 0xB703
SO_NETNS_COOKIE: Final = 71

_libc = ct.CDLL(None, use_errno=True)
_libc.setns.argtypes = [ct.c_int, ct.c_int]
_libc.unshare.argtypes = [ct.c_int]
_libc.mount.argtypes = [ct.c_char_p, ct.c_char_p, ct.c_char_p, ct.c_ulong, ct.c_char_p]
_libc.umount2.argtypes = [ct.c_char_p, ct.c_int]
_libc.fstatfs.argtypes = [ct.c_int, ct.c_void_p]
_MS_BIND, _MNT_DETACH = 4096, 2


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ct.get_errno()
        raise OSError(number, os.strerror(number), what)


class NetNs:
    """An open network namespace. The descriptor keeps it alive until `close`."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd, self.path = fd, path
        status = os.fstat(fd)
        self.inode = status.st_ino
        """Number of the namespace, unique while it lives (`ls -i` of its file)."""
        self.dev = status.st_dev

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open e.g. /run/netns/x or /proc/1/ns/net.

        NotFound if there is no such file (any more); InvalidArgument if it is something else than a network
        namespace, as a leftover mount point of a dead one is; PermissionDenied.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
            raise errors.NotFound(f"network namespace {path} does not exist", field="netns") from None
        except PermissionError as error:
            raise errors.PermissionDenied(
                f"may not open network namespace {path}: {error.strerror}",
                field="netns",
                fix="run as root with CAP_SYS_ADMIN",
            ) from None
        except OSError as error:
            raise errors.InvalidArgument(
                f"network namespace {path}: {error.strerror}", field="netns"
            ) from None
        if not is_netns(fd):
            os.close(fd)
            raise errors.InvalidArgument(
                f"{path} is not a network namespace",
                field="netns",
                fix="name a file such as /run/netns/NAME or /proc/PID/ns/net",
            )
        return cls(fd, str(path))

    @classmethod
    def current(cls) -> Self:
        """The calling thread's own namespace."""
        return cls.open("/proc/thread-self/ns/net")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def same_as(self, other: NetNs) -> bool:
        return (self.dev, self.inode) == (other.dev, other.inode)

    def cookie(self) -> int:
        """The kernel's never reused 64-bit name of the namespace, as bpf_get_netns_cookie gives it.

        Enters the namespace: netlink thread only.
        """
        with self.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            return socket_cookie(probe)

    def socket(self, family: int, kind: int, proto: int = 0) -> socket.socket:
        """A socket that belongs to this namespace. Enters it for a moment: netlink thread only."""
        with self.entered():
            return socket.socket(family, kind, proto)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run the body inside the namespace (calling thread only), then return to where it was."""
        with NetNs.current() as home:
            if self.same_as(home):
                yield
                return
            try:
                _check(_libc.setns(self.fd, CLONE_NEWNET), f"enter {self.path}")
            except PermissionError as error:
                raise errors.PermissionDenied(
                    f"may not enter network namespace {self.path}: {error.strerror}",
                    fix="run as root with CAP_SYS_ADMIN",
                ) from None
            try:
                yield
            finally:
                # Nothing sensible can be done on a thread that cannot come home, so this must be loud.
                _check(_libc.setns(home.fd, CLONE_NEWNET), "return to the node's network namespace")


def is_netns(fd: int) -> bool:
    """Whether the descriptor is of a network namespace (nsfs, type NEWNET)."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return False
    answer = ct.create_string_buffer(256)
    _check(_libc.fstatfs(fd, answer), "statfs")
    if struct.unpack_from("l", answer.raw)[0] != NSFS_MAGIC:
        return False
    return fcntl.ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWNET


def socket_cookie(sock: socket.socket) -> int:
    """The cookie of the namespace a socket belongs to."""
    return int(struct.unpack("Q", sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0])


def add(path: Path) -> None:
    """Make a new namespace and mount it at `path`, as `ip netns add` does. AlreadyExists if there is a file.

    Changes the calling thread's namespace for a moment: netlink thread only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o444))
    except FileExistsError:
        raise errors.AlreadyExists(f"network namespace {path} exists already", field="netns") from None
    try:
        with NetNs.current() as home:
            _check(_libc.unshare(CLONE_NEWNET), "make a network namespace")
            try:
                _check(
                    _libc.mount(b"/proc/thread-self/ns/net", os.fsencode(path), b"none", _MS_BIND, None),
                    f"mount {path}",
                )
            finally:
                _check(_libc.setns(home.fd, CLONE_NEWNET), "return to the node's network namespace")
    except OSError as error:
        os.unlink(path)
        denied = error.errno == errno.EPERM
        kind = errors.PermissionDenied if denied else errors.FailedPrecondition
        raise kind(
            f"cannot add network namespace {path}: {error.strerror}",
            fix="run as root with CAP_SYS_ADMIN" if denied else "",
        ) from None


def remove(path: Path) -> bool:
    """Unmount and remove what `add` made; whether it was there.

    The kernel frees it when its last user is gone.
    """
    try:
        _check(_libc.umount2(os.fsencode(path), _MNT_DETACH), f"unmount {path}")
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.EINVAL:  # not a mount point: a leftover plain file
            raise errors.FailedPrecondition(f"cannot unmount {path}: {error.strerror}") from None
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
