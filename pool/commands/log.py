"""`tabpool log`: the control log of a pool, printed or verified.

The command line of `recovery.log`. This module must not write to a log.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from pool.commands.log_view import logged_line
from pool.state_folders import newest_folder, state_root
from recovery.log import log

logs = typer.Typer(
    help="Print or verify the control log of a pool: what its supervisor saw and decided.",
    no_args_is_help=True,
)
_Pool = Annotated[str, typer.Argument(help="The pool's name; by default the newest pool.")]
_State = Annotated[
    str,
    typer.Option(
        "--state-dir",
        help="Folder of the pools' state; by default $TABPOOL_STATE or the user's state folder.",
    ),
]


@logs.command("show")
def log_show(
    pool: _Pool = "",
    state_dir: _State = "",
    since: Annotated[int, typer.Option(help="Number of the first event to print.")] = 1,
    limit: Annotated[int, typer.Option(help="Maximum number of events.")] = 1000,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, one object per line.")
    ] = False,
) -> None:
    """Print the events of a pool's log; the pool may be running."""
    folder = newest_folder(state_root(state_dir), pool) / "log"
    for event in log.show(folder, since, limit):
        typer.echo(json.dumps(event) if as_json else logged_line(event))


@logs.command("verify")
def log_verify(
    pool: _Pool = "",
    state_dir: _State = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Read and replay a whole log. Exit code 0 if no acknowledged event is lost, else 1."""
    folder = newest_folder(state_root(state_dir), pool) / "log"
    report = log.verify(folder)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        typer.echo(f"{folder}: {'ok' if report.ok else 'DAMAGED'}")
        typer.echo(
            f"{report.events} events ({report.first_seq} to {report.last_seq}) in "
            f"{report.segments} segments, checkpoints at {report.checkpoints or 'none'}"
        )
        for lost in (*report.lost, *report.lost_before):
            typer.echo(f"lost: events {lost}")
        for damage in report.damage:
            typer.echo(f"damage: {damage}")
    raise typer.Exit(0 if report.ok else 1)
