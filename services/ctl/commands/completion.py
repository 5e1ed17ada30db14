"""`fibril completion`: shell completion."""

from __future__ import annotations

import click

SHELLS = {
    "bash": 'eval "$(fibril completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(fibril completion zsh)"   # in ~/.zshrc',
    "fish": "fibril completion fish > ~/.config/fish/completions/fibril.fish",
}


@click.command(epilog="\b\n" + "\n".join(SHELLS.values()))
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    from click.shell_completion import get_completion_class

    root = ctx.find_root().command
    made = get_completion_class(shell)
    assert made is not None  # the choice above allows only shells click knows
    # The script text itself; source() would first start the shell to ask for its version.
    complete = made(root, {}, "fibril", "_FIBRIL_COMPLETE")
    click.echo(complete.source_template % complete.source_vars())
