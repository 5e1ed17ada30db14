"""`fibril version`."""

from __future__ import annotations

import platform

import click

from services.ctl.context import Ctl, pass_ctl


@click.command(short_help="Versions of Fibril, Python, kernel.")
@pass_ctl
def command(ctl: Ctl) -> None:
    """Show the versions of this command, Python and the kernel."""
    from services.common.version import version

    ctl.describe({"fibril": version(), "python": platform.python_version(), "kernel": platform.release()})
