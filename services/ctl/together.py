"""Several services in one process: `python -m services.ctl.together --services ipam,… --instance NAME …`.

For small nodes and the lab: one interpreter's memory instead of one a service. The services are the same objects that
`python -m services.<name>` runs, each on its own socket; the host's options are those of the first one's configuration.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from services.common import config, host
from services.common.errors import FibrilError
from services.common.host import HostConfig, Service
from services.common.instance import Instance

Overrides = Mapping[str, str]


def _ipam(instance: Instance, file: Path | None, overrides: Overrides) -> tuple[Service, HostConfig]:
    from services.ipam.config import IpamConfig
    from services.ipam.wiring import IpamService

    cfg = config.load(IpamConfig, file=file, overrides=overrides)
    return IpamService(instance, cfg), cfg.host


BUILD: Mapping[str, Callable[[Instance, Path | None, Overrides], tuple[Service, HostConfig]]] = {
    "ipam": _ipam
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 after a drain, 1 after a failure, 2 for a wrong command line or configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m services.ctl.together", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--services", required=True, metavar="NAME,NAME", help=f"from: {', '.join(BUILD)}")
    parser.add_argument("--instance", default="node", help="instance name (default: node)")
    parser.add_argument("--etcd", default="", metavar="URL,URL", help="etcd members")
    parser.add_argument("--cluster", default="", help="cluster name")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file (YAML)")
    args = parser.parse_args(argv)
    names = args.services.split(",")
    for name in names:
        if name not in BUILD:
            parser.error(f"there is no service {name!r}")
    given = {"etcd.endpoints": args.etcd, "etcd.cluster": args.cluster}
    overrides = {key: value for key, value in given.items() if value}
    try:
        instance = Instance.from_env(args.instance)
        built = [BUILD[name](instance, args.config, overrides) for name in names]
    except FibrilError as error:
        print(f"fibril: {error}", file=sys.stderr)
        return 2
    return host.run([service for service, _ in built], built[0][1], instance)


if __name__ == "__main__":
    sys.exit(main())
