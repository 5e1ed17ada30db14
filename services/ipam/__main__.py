"""`python -m services.ipam`: parse the configuration, run, nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from services.common import config, host
from services.common.errors import FibrilError
from services.common.instance import Instance
from services.ipam.config import IpamConfig


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 after a drain, 1 after a failure, 2 for a wrong command line or configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m services.ipam", description="Fibril's ipam service for one node."
    )
    parser.add_argument("--instance", default="node", help="instance name (default: node)")
    parser.add_argument(
        "--etcd", default="", metavar="URL,URL", help="etcd members; etcd.endpoints in the configuration"
    )
    parser.add_argument("--cluster", default="", help="cluster name; etcd.cluster in the configuration")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file (YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one option of the configuration, e.g. endpoints.mtu=1400; may be repeated",
    )
    args = parser.parse_args(argv)
    overrides = {"etcd.endpoints": args.etcd, "etcd.cluster": args.cluster}
    overrides = {key: value for key, value in overrides.items() if value}
    for option in args.set:
        key, equals, value = option.partition("=")
        if not equals:
            parser.error(f"--set {option}: KEY=VALUE is wanted")
        overrides[key] = value
    try:
        cfg = config.load(IpamConfig, file=args.config, overrides=overrides)
        instance = Instance.from_env(args.instance)
        from services.ipam.wiring import IpamService

        service = IpamService(instance, cfg)
    except FibrilError as error:
        print(f"fibril ipam: {error}", file=sys.stderr)
        return 2
    return host.run([service], cfg.host, instance)


if __name__ == "__main__":
    sys.exit(main())
