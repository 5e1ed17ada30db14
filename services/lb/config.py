"""Configuration of the lb process; every option has a default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from services.common.errors import InvalidArgument
from services.common.etcd.config import EtcdConfig
from services.common.host import HostConfig
from services.common.network import NetworkConfig
from services.lb.kernel.flows import Limits
from services.lb.model import Forwarding
from services.lb.plan import Defaults

FORWARDING: Final = {"snat": Forwarding.SNAT, "dsr": Forwarding.DSR, "hybrid": Forwarding.HYBRID}
XDP_MODES: Final = ("auto", "off", "native", "generic")
_FLOWS: Final = (16_384, 1 << 26)
_NATS: Final = (16_384, 1 << 24)


@dataclass(frozen=True)
class LbSection:
    """Section `lb`."""

    sockets: bool = field(
        default=True, metadata={"help": "translate at connect() and sendmsg() of pods and host processes"}
    )
    cgroup: str = field(
        default="",
        metadata={"help": "control group whose processes that concerns, below the cgroup2 mount; empty: all"},
    )
    devices: tuple[str, ...] = field(
        default=(), metadata={"help": "interfaces that clients outside come by; none: that of network.device"}
    )
    xdp: str = field(
        default="auto",
        metadata={"help": "auto (while something outside is to be served or filtered), off, native, generic"},
    )
    forwarding: str = field(
        default="snat",
        metadata={
            "help": "to backends on other nodes, where a service does not say: snat, dsr, hybrid (TCP dsr)"
        },
    )
    zone: str = field(default="", metadata={"help": "zone this node is in, for topology; empty: none"})
    snat_ports: tuple[str, ...] = field(
        default=("1024-29999", "61000-65535"),
        metadata={
            "help": "one or two ranges of this node's ports for connections to backends; nobody else's"
        },
    )
    flows_max: int = field(default=1 << 22, metadata={"help": "connections remembered at most"})
    nat_max: int = field(default=1 << 20, metadata={"help": "translated connections remembered at most"})
    tcp_s: int = field(
        default=21600, metadata={"help": "seconds of silence after which a TCP connection is over"}
    )
    any_s: int = field(default=120, metadata={"help": "the same for all other protocols"})

    def __post_init__(self) -> None:
        if self.xdp not in XDP_MODES:
            raise InvalidArgument(
                f"{self.xdp!r} is not known", field="xdp", fix=f"one of: {', '.join(XDP_MODES)}"
            )
        if self.forwarding not in FORWARDING:
            raise InvalidArgument(
                f"{self.forwarding!r} is not known",
                field="forwarding",
                fix=f"one of: {', '.join(FORWARDING)}",
            )
        if self.cgroup.startswith("/") or ".." in self.cgroup.split("/"):
            raise InvalidArgument(
                f"{self.cgroup!r} is not below the cgroup2 mount",
                field="cgroup",
                fix="give it without leading slash",
            )
        for name, (least, most) in {"flows_max": _FLOWS, "nat_max": _NATS}.items():
            if not least <= getattr(self, name) <= most:
                raise InvalidArgument(f"{getattr(self, name)} is outside {least}..{most}", field=name)
        for name in ("tcp_s", "any_s"):
            # A stamp wraps after nine hours.
            if not 10 <= getattr(self, name) <= 30_000:
                raise InvalidArgument(f"{getattr(self, name)} is outside 10..30000", field=name)
        self.port_ranges()

    def port_ranges(self) -> list[int]:
        """As lb_config takes them: two, first port << 16 | last, 0 for none."""
        if not 1 <= len(self.snat_ports) <= 2:
            raise InvalidArgument(f"{len(self.snat_ports)} ranges", field="snat_ports", fix="give one or two")
        found = []
        for text in self.snat_ports:
            first, _, last = text.partition("-")
            if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= 65535):
                raise InvalidArgument(
                    f"{text!r} is no range of ports", field="snat_ports", fix="as 1024-29999"
                )
            found.append(int(first) << 16 | int(last))
        return [*found, 0][:2]

    def limits(self) -> Limits:
        return Limits(flows=self.flows_max, nats=self.nat_max, tcp_s=self.tcp_s, any_s=self.any_s)

    def defaults(self) -> Defaults:
        return Defaults(FORWARDING[self.forwarding])


@dataclass(frozen=True)
class LbConfig:
    """All sections of the lb process."""

    host: HostConfig = field(default_factory=HostConfig)
    etcd: EtcdConfig = field(default_factory=EtcdConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    lb: LbSection = field(default_factory=LbSection)
