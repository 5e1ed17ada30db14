"""Names of one Fibril node. Every path, device and table of a node derives from its instance name, so that
several nodes (and tests) live on one kernel without meeting.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from services.common.errors import InvalidArgument

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")
# sockaddr_un.sun_path holds 108 bytes with its final NUL; the longest file below run_dir is a socket's.
_SUN_PATH_MAX = 107
_LONGEST_SOCKET = "/sockaccel.sock"
# "fb" + 4 hexadecimal digits of tag + id: IFNAMSIZ leaves 15 characters.
ENDPOINT_ID_MAX = 0xFFFF_FFFF


@dataclass(frozen=True)
class Instance:
    """One node on this kernel.

    Raises InvalidArgument for a name outside [a-z0-9-]{1,40} (no dash at either end), a relative root, or a
    run directory whose sockets would exceed the kernel's path limit.
    """

    name: str = "node"
    run_root: Path = Path("/run/fibril")
    state_root: Path = Path("/var/lib/fibril")
    bpffs: Path = Path("/sys/fs/bpf")

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidArgument(
                f"instance name {self.name!r} is not valid",
                field="instance",
                fix="use 1 to 40 lower-case letters, digits and dashes, no dash at the ends",
            )
        for field in ("run_root", "state_root", "bpffs"):
            path = Path(getattr(self, field))
            if not path.is_absolute():
                raise InvalidArgument(f"{path} is not an absolute path", field=field)
            object.__setattr__(self, field, path)
        if len(os.fsencode(self.run_dir)) + len(_LONGEST_SOCKET) > _SUN_PATH_MAX:
            raise InvalidArgument(
                f"run directory {self.run_dir} is too long for unix sockets",
                field="run_root",
                fix=f"keep it within {_SUN_PATH_MAX - len(_LONGEST_SOCKET)} bytes",
            )

    @classmethod
    def from_env(cls, name: str = "node", env: Mapping[str, str] | None = None) -> Instance:
        """The instance `name` under the roots of FIBRIL_RUN_ROOT, FIBRIL_STATE_ROOT and FIBRIL_BPFFS."""
        source = os.environ if env is None else env
        roots = {
            field: Path(source[key])
            for field, key in (
                ("run_root", "FIBRIL_RUN_ROOT"),
                ("state_root", "FIBRIL_STATE_ROOT"),
                ("bpffs", "FIBRIL_BPFFS"),
            )
            if source.get(key)
        }
        return cls(name, **roots)

    @property
    def run_dir(self) -> Path:
        """Sockets and pid files; gone after a reboot."""
        return self.run_root / self.name

    @property
    def state_dir(self) -> Path:
        """What must survive a reboot."""
        return self.state_root / self.name

    @property
    def pin_dir(self) -> Path:
        """Pinned maps and programs: <family>/v<version>/<map> and prog/<service>/<program>."""
        return self.bpffs / "fibril" / self.name

    @property
    def cni_socket(self) -> Path:
        """Where the CNI plugin reaches the ipam process."""
        return self.run_dir / "cni.sock"

    @cached_property
    def tag(self) -> str:
        """Four hexadecimal digits of the name's hash; part of every device name of this node."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:4]

    @property
    def node_ifname(self) -> str:
        """The device that carries the node's gateway addresses."""
        return f"fb{self.tag}host"

    @property
    def node_peer_ifname(self) -> str:
        """The other end of `node_ifname`'s veth pair."""
        return f"fb{self.tag}peer"

    @property
    def cgroup(self) -> str:
        """Path of this node's cgroup, relative to the cgroup2 mount."""
        return f"fibril/{self.name}"

    @property
    def nft_table(self) -> str:
        """Name of this node's nftables table (family inet)."""
        return f"fibril-{self.name}"

    def socket(self, service: str) -> Path:
        """The unix socket of a service's gRPC server."""
        return self.run_dir / f"{service}.sock"

    def pidfile(self, process: str) -> Path:
        """The locked pid file of a process (see services.common.pidfile)."""
        return self.run_dir / f"{process}.pid"

    def host_ifname(self, endpoint_id: int) -> str:
        """Name of the host side of an endpoint's veth, at most 15 characters."""
        if not 0 < endpoint_id <= ENDPOINT_ID_MAX:
            raise InvalidArgument(f"endpoint id {endpoint_id} is outside 1..{ENDPOINT_ID_MAX}", field="id")
        return f"fb{self.tag}{endpoint_id:x}"
