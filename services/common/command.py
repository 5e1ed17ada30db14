"""The command line that every service has: `python -m services.NAME --instance … --config …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from services.common import config, host, sections
from services.common.errors import FibrilError
from services.common.host import HostConfig, Service
from services.common.instance import Instance


class ServiceConfig(Protocol):
    """A service's configuration: a frozen dataclass of sections, `host` among them."""

    @property
    def host(self) -> HostConfig: ...


C = TypeVar("C", bound=ServiceConfig)


def main(argv: Sequence[str] | None, name: str, cls: type[C], build: Callable[[Instance, C], Service]) -> int:
    """Run the service `name` as the words say. The exit code: 0 after a drain, 1 after a failure, 2 for a wrong
    command line or configuration.
    """
    parser = argument_parser(f"python -m services.{name}", f"Fibril's {name} service for one node.")
    args = parser.parse_args(argv)
    given = overrides(parser, args)
    try:
        cfg = load(name, cls, args.config, given)
        instance = Instance.from_env(args.instance)
        service = build(instance, cfg)
    except FibrilError as error:
        print(f"fibril {name}: {error}", file=sys.stderr)
        return 2
    return host.run([service], cfg.host, instance)


def argument_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options all services share."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
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
        help="one option of the configuration, e.g. network.mode=routed; may be repeated",
    )
    return parser


def overrides(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, str]:
    """What the words say about the configuration: dotted path -> text."""
    given = {"etcd.endpoints": args.etcd, "etcd.cluster": args.cluster}
    found = {key: value for key, value in given.items() if value}
    for option in args.set:
        key, equals, value = option.partition("=")
        if not equals:
            parser.error(f"--set {option}: KEY=VALUE is wanted")
        found[key] = value
    return found


def load(name: str, cls: type[C], file: Path | None, given: Mapping[str, str]) -> C:
    """A service's configuration out of the node's; see config.load for the errors."""
    cfg = config.load(cls, file=file, overrides=given, others=sections.others(name))
    number = list(sections.SECTIONS).index(name)
    changed: C = replace(cast(Any, cfg), host=cfg.host.of_process(number))
    return changed
