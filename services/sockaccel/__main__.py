"""`python -m services.sockaccel`: parse the configuration, run, nothing else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from services.common import command
from services.common.host import Service
from services.common.instance import Instance
from services.sockaccel.config import SockAccelConfig


def build(instance: Instance, cfg: SockAccelConfig) -> Service:
    """The service; imported only once its configuration is known to be right."""
    from services.sockaccel.wiring import SockAccelService

    return SockAccelService(instance, cfg)


def main(argv: Sequence[str] | None = None) -> int:
    """See command.main."""
    return command.main(argv, "sockaccel", SockAccelConfig, build)


if __name__ == "__main__":
    sys.exit(main())
