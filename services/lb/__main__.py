"""`python -m services.lb`: parse the configuration, run, nothing else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from services.common import command
from services.common.host import Service
from services.common.instance import Instance
from services.lb.config import LbConfig


def build(instance: Instance, cfg: LbConfig) -> Service:
    """The service; imported only once its configuration is known to be right."""
    from services.lb.wiring import LbService

    return LbService(instance, cfg)


def main(argv: Sequence[str] | None = None) -> int:
    """See command.main."""
    return command.main(argv, "lb", LbConfig, build)


if __name__ == "__main__":
    sys.exit(main())
