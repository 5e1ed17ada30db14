"""`python -m services.ipam`: parse the configuration, run, nothing else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from services.common import command
from services.common.host import Service
from services.common.instance import Instance
from services.ipam.config import IpamConfig


def build(instance: Instance, cfg: IpamConfig) -> Service:
    """The service; imported only once its configuration is known to be right."""
    from services.ipam.wiring import IpamService

    return IpamService(instance, cfg)


def main(argv: Sequence[str] | None = None) -> int:
    """See command.main."""
    return command.main(argv, "ipam", IpamConfig, build)


if __name__ == "__main__":
    sys.exit(main())
