"""`python -m services.identity`: parse the configuration, run, nothing else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from services.common import command
from services.common.host import Service
from services.common.instance import Instance
from services.identity.config import IdentityConfig


def build(instance: Instance, cfg: IdentityConfig) -> Service:
    """The service; imported only once its configuration is known to be right."""
    from services.identity.wiring import IdentityService

    return IdentityService(instance, cfg)


def main(argv: Sequence[str] | None = None) -> int:
    """See command.main."""
    return command.main(argv, "identity", IdentityConfig, build)


if __name__ == "__main__":
    sys.exit(main())
