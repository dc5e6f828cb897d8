"""The `tabpool` command: a table of subcommands, each in a module of its own.

This module must not do the work of a subcommand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import typer
from rich.console import Console

from pool.commands import chaos, generate, log, replay, shard
from pool.commands.demo import demo
from pool.commands.doctor import doctor
from pool.commands.printing import print_error
from pool.commands.version import version
from recovery.errors import PoolError


@dataclass(frozen=True)
class Command:
    """A subcommand: the function that typer reads its options from, and what `--help` ends with."""

    run: Callable[..., None]
    epilog: str | None = None


COMMANDS = (
    Command(doctor),
    Command(demo),
    Command(shard.shard, shard.EPILOG),
    Command(generate.generate, generate.EPILOG),
    Command(chaos.chaos, chaos.EPILOG),
    Command(replay.replay, replay.EPILOG),
    Command(version),
)
GROUPS = {"log": log.logs}

app = typer.Typer(
    name="tabpool",
    help="Run ONNX models in a pool of real web browsers, with recovery from crashes, hangs and "
    "wrong answers.",
    no_args_is_help=True,
    add_completion=False,
)
for command in COMMANDS:
    app.command(epilog=command.epilog)(command.run)
for name, group in GROUPS.items():
    app.add_typer(group, name=name)


def main() -> None:
    """Entry point: `PoolError`s are printed as messages, not tracebacks."""
    try:
        app()
    except PoolError as error:
        print_error(Console(stderr=True), error)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
