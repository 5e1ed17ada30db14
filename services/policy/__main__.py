"""`python -m services.policy`: parse the configuration, run, nothing else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from services.common import command
from services.common.host import Service
from services.common.instance import Instance
from services.policy.config import PolicyConfig


def build(instance: Instance, cfg: PolicyConfig) -> Service:
    """The service; imported only once its configuration is known to be right."""
    from services.policy.wiring import PolicyService

    return PolicyService(instance, cfg)


def main(argv: Sequence[str] | None = None) -> int:
    """See command.main."""
    return command.main(argv, "policy", PolicyConfig, build)


if __name__ == "__main__":
    sys.exit(main())
