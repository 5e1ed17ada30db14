"""`fibril cni`: let container runtimes use Fibril."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from services.ctl.context import Ctl, pass_ctl

BIN_DIR = click.option(
    "--bin-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the runtime's plugins; by default where plugins are already.",
)
CONF_DIR = click.option(
    "--conf-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the runtime's network configurations; by default /etc/cni/net.d.",
)


@click.group(short_help="The CNI plugin and its configuration.")
def command() -> None:
    """The CNI plugin and its configuration."""


@command.command("install")
@BIN_DIR
@CONF_DIR
@click.option("--network", default="", help='Name of the network; by default "fibril".')
@click.option("--pool", default="", help="Pool its pods get addresses from.")
@click.option(
    "--mtu", type=click.IntRange(1280, 65535), help="MTU of its pods in bytes; by default the uplink's."
)
@click.option(
    "--chain",
    multiple=True,
    type=click.Choice(["portmap", "bandwidth"]),
    help="A plugin to run after ours; by default both, as far as they are installed.",
)
@click.option("--no-chain", is_flag=True, help="Run no other plugin.")
@pass_ctl
def install(
    ctl: Ctl,
    bin_dir: Path | None,
    conf_dir: Path | None,
    network: str,
    pool: str,
    mtu: int | None,
    chain: Sequence[str],
    no_chain: bool,
) -> None:
    """Install the plugin and a network configuration; again is an update."""
    from services.ctl import cnidirs
    from services.ipam.cni import install as cni

    if chain and no_chain:
        raise click.UsageError("--chain and --no-chain exclude each other.")
    options: dict[str, Any] = {"network": network, "pool": pool, "mtu": mtu or 0}
    if chain or no_chain:
        options["chained"] = tuple(chain)
    bins, confs = bin_dir or cni.default_bin_dir(), conf_dir or cni.CONF_DIR
    # Written down first: `fibril down` finds what a killed `install` had begun.
    cnidirs.remember(ctl.instance, bins, confs)
    done = cni.install(ctl.instance, bins.absolute(), confs.absolute(), **options)
    ctl.describe({"plugin": str(done.plugin), "configuration": str(done.conflist), "chain": list(done.chain)})


@command.command("uninstall")
@BIN_DIR
@CONF_DIR
@pass_ctl
def uninstall(ctl: Ctl, bin_dir: Path | None, conf_dir: Path | None) -> None:
    """Remove plugin and configuration from where they were installed; nothing there is success."""
    from services.ctl import cnidirs
    from services.ipam.cni import install as cni

    places = cnidirs.known(ctl.instance)
    if bin_dir or conf_dir:
        places = [(bin_dir or cni.default_bin_dir(), conf_dir or cni.CONF_DIR)]
    removed = [path for bins, confs in places for path in cni.uninstall(ctl.instance, bins, confs)]
    cnidirs.forget(ctl.instance, places)
    for path in removed:
        click.echo(f"removed {path}")
    if not removed:
        click.echo("nothing was installed")
