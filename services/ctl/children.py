"""Which processes a node consists of, by how it is run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument
from services.common.instance import Instance
from services.ctl.child import ChildSpec

if TYPE_CHECKING:
    from services.common.etcd.embedded import EmbeddedEtcd, Member

# Service -> module that runs it; in order of start.
SERVICES = {name: f"services.{name}" for name in ("ipam", "identity", "lb", "policy", "sockaccel")}
ETCD = "etcd"  # name of the child process, its directory and its log


@dataclass(frozen=True)
class Options:
    """How a node is run. Kept by the supervisor; another `up` with other options starts the processes
    anew."""

    services: tuple[str, ...] = tuple(SERVICES)
    in_process: bool = False
    etcd: tuple[str, ...] = ()
    config: str = ""
    cluster: str = ""
    etcd_members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Lists come from JSON.
        object.__setattr__(self, "services", tuple(self.services))
        object.__setattr__(self, "etcd", tuple(self.etcd))
        object.__setattr__(self, "etcd_members", tuple(self.etcd_members))
        if self.etcd and self.etcd_members:
            raise InvalidArgument(
                "there cannot be both an etcd of others and members of our own",
                field="etcd_members",
                fix="give --etcd or --etcd-members",
            )
        unknown = [s for s in self.services if s not in SERVICES]
        if unknown or not self.services:
            raise InvalidArgument(
                f"there is no service {', '.join(unknown) or 'named'}",
                field="services",
                fix=f"choose from: {', '.join(SERVICES)}",
            )


def embedded_etcd(instance: Instance, member: Member | None = None) -> EmbeddedEtcd:
    """The etcd a node has when it is given none, or the member of one that lives here."""
    from services.common.etcd.embedded import EmbeddedEtcd

    return EmbeddedEtcd(instance.state_dir / "etcd", instance.run_dir / ETCD, member=member)


def own_etcd(instance: Instance, options: Options) -> tuple[tuple[str, ...], EmbeddedEtcd | None]:
    """URLs of the etcd to use, and the server that is to run here."""
    from services.common.etcd.embedded import Member, client_url

    if options.etcd:
        return options.etcd, None
    if not options.etcd_members:
        alone = embedded_etcd(instance)
        return (alone.endpoint,), alone
    urls = tuple(client_url(address) for address in options.etcd_members)
    own = next(filter(_is_local, options.etcd_members), None)
    return urls, None if own is None else embedded_etcd(instance, Member(own, options.etcd_members))


def _is_local(address: str) -> bool:
    """Whether this host has an address. Raises InvalidArgument when it is none."""
    import socket
    from ipaddress import ip_address

    try:
        family = socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6
    except ValueError:
        raise InvalidArgument(f"{address!r} is not an IP address", field="etcd_members") from None
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def specs(instance: Instance, options: Options) -> list[ChildSpec]:
    """The processes of a node, in order of start. Raises FailedPrecondition when etcd is not installed."""
    children = []
    urls, etcd = own_etcd(instance, options)
    if etcd is not None:
        children.append(ChildSpec(ETCD, etcd.argv, etcd.env, etcd.cwd, etcd.prepare))
    words = ["--instance", instance.name, "--etcd", ",".join(urls)]
    if options.config:
        words += ["--config", options.config]
    if options.cluster:
        words += ["--cluster", options.cluster]
    if options.in_process:
        argv = (
            sys.executable,
            "-m",
            "services.ctl.together",
            "--services",
            ",".join(options.services),
            *words,
        )
        return [*children, ChildSpec("together", argv)]
    for service in options.services:
        argv = (sys.executable, "-m", SERVICES[service], *words)
        children.append(ChildSpec(service, argv))
    return children
