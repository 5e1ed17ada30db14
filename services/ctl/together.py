"""Several services in one process: `python -m services.ctl.together --services ipam,… --instance NAME …`.

For small nodes and the lab: one interpreter's memory instead of one a service. The services are the same objects that
`python -m services.<name>` runs, each on its own socket; the host's options are those of the first one's configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from services.common import command, host
from services.common.errors import FibrilError
from services.common.host import HostConfig, Service
from services.common.instance import Instance

Overrides = Mapping[str, str]


def _ipam(instance: Instance, file: Path | None, overrides: Overrides) -> tuple[Service, HostConfig]:
    from services.ipam.__main__ import build
    from services.ipam.config import IpamConfig

    cfg = command.load("ipam", IpamConfig, file, overrides)
    return build(instance, cfg), cfg.host


def _identity(instance: Instance, file: Path | None, overrides: Overrides) -> tuple[Service, HostConfig]:
    from services.identity.__main__ import build
    from services.identity.config import IdentityConfig

    cfg = command.load("identity", IdentityConfig, file, overrides)
    return build(instance, cfg), cfg.host


def _lb(instance: Instance, file: Path | None, overrides: Overrides) -> tuple[Service, HostConfig]:
    from services.lb.__main__ import build
    from services.lb.config import LbConfig

    cfg = command.load("lb", LbConfig, file, overrides)
    return build(instance, cfg), cfg.host


def _policy(instance: Instance, file: Path | None, overrides: Overrides) -> tuple[Service, HostConfig]:
    from services.policy.__main__ import build
    from services.policy.config import PolicyConfig

    cfg = command.load("policy", PolicyConfig, file, overrides)
    return build(instance, cfg), cfg.host


def _sockaccel(instance: Instance, file: Path | None, overrides: Overrides) -> tuple[Service, HostConfig]:
    from services.sockaccel.__main__ import build
    from services.sockaccel.config import SockAccelConfig

    cfg = command.load("sockaccel", SockAccelConfig, file, overrides)
    return build(instance, cfg), cfg.host


BUILD: Mapping[str, Callable[[Instance, Path | None, Overrides], tuple[Service, HostConfig]]] = {
    "ipam": _ipam,
    "identity": _identity,
    "lb": _lb,
    "policy": _policy,
    "sockaccel": _sockaccel,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 after a drain, 1 after a failure, 2 for a wrong command line or configuration."""
    parser = command.argument_parser("python -m services.ctl.together", (__doc__ or "").split("\n")[0])
    parser.add_argument("--services", required=True, metavar="NAME,NAME", help=f"from: {', '.join(BUILD)}")
    args = parser.parse_args(argv)
    names = args.services.split(",")
    for name in names:
        if name not in BUILD:
            parser.error(f"there is no service {name!r}")
    overrides = command.overrides(parser, args)
    try:
        instance = Instance.from_env(args.instance)
        built = [BUILD[name](instance, args.config, overrides) for name in names]
    except FibrilError as error:
        print(f"fibril: {error}", file=sys.stderr)
        return 2
    return host.run([service for service, _ in built], built[0][1], instance)


if __name__ == "__main__":
    sys.exit(main())
