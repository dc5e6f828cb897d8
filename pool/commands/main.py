"""The `tabpool` command. Each subcommand is a thin face on a module of its own."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pool import doctor as examination
from pool.commands.chaos import EPILOG as CHAOS_EPILOG
from pool.commands.chaos import chaos
from pool.commands.generate import EPILOG as GENERATE_EPILOG
from pool.commands.generate import generate
from pool.commands.log_view import logged_line
from pool.commands.replay import EPILOG as REPLAY_EPILOG
from pool.commands.replay import replay
from pool.commands.shard import EPILOG as SHARD_EPILOG
from pool.commands.shard import shard
from pool.state_folders import newest_folder, state_root
from recovery.errors import PoolError
from recovery.kinds import BrowserType, detect_browser_type
from recovery.log import log

app = typer.Typer(
    name="tabpool",
    help="Run ONNX models in a pool of real web browsers that may crash, hang or lie.",
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def _root() -> None:
    """Keeps subcommands named even while there are few."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print findings as JSON.")] = False,
    browsers: Annotated[
        str, typer.Option(help="Only these, separated by commas: chrome,firefox,safari,edge.")
    ] = "",
    headed: Annotated[bool, typer.Option("--headed", help="Show the browsers' windows.")] = False,
) -> None:
    """Launch every browser here and show what it really has.

    Exit code 0 if a pool can run on this machine, 1 if no browser is usable.
    """
    kinds = [detect_browser_type(name) for name in browsers.split(",") if name] or list(BrowserType)
    console = Console(stderr=as_json)

    async def look() -> list[examination.Finding]:
        found = []
        with console.status("") as status:
            names = iter(kinds)
            status.update(f"launching {next(names)} ...")
            async for finding in examination.examine(kinds, headless=not headed):
                found.append(finding)
                following = next(names, None)
                if following:
                    status.update(f"launching {following} ...")
        return found

    findings = asyncio.run(look())
    if as_json:
        typer.echo(json.dumps(examination.as_json(findings), indent=2, default=str))
    else:
        _show(console, findings)
    raise typer.Exit(0 if examination.verdict(findings) else 1)


def _show(console: Console, findings: list[examination.Finding]) -> None:
    table = Table(title="browsers on this machine")
    for column in ("type", "product", "WASM", "WebGPU adapter", "WebNN", "ready in", "usable"):
        table.add_column(column)
    for finding in findings:
        table.add_row(*examination.as_row(finding))
    console.print(table)
    for finding in findings:
        for line in (finding.problem, *finding.hints):
            if line:
                console.print(
                    f"  {finding.browser}: {line}", highlight=False, markup=False, soft_wrap=True
                )
    machine = examination.machine()
    console.print(", ".join(f"{k} {v}" for k, v in machine.items() if k != "executable"))
    if examination.verdict(findings):
        usable = ", ".join(str(f.browser) for f in findings if f.usable)
        console.print(f"[green]A pool can run here[/green] with: {usable}")
    else:
        console.print("[red]No browser here is usable[/red]; see the lines above for the remedy.")


@app.command()
def demo() -> None:
    """Embed sentences and write a passage in real browsers that are killed on the way."""
    from pool.demo.demo import main as demonstrate

    raise typer.Exit(demonstrate())


app.command(epilog=SHARD_EPILOG)(shard)
app.command(epilog=GENERATE_EPILOG)(generate)
app.command(epilog=CHAOS_EPILOG)(chaos)
app.command(epilog=REPLAY_EPILOG)(replay)


logs = typer.Typer(
    help="Look at the control log of a pool: what its supervisor saw and decided.",
    no_args_is_help=True,
)
app.add_typer(logs, name="log")
_Pool = Annotated[str, typer.Argument(help="The pool's name; by default the newest one.")]
_State = Annotated[
    str, typer.Option("--state-dir", help="Where pools keep their state (see TABPOOL_STATE).")
]


@logs.command("show")
def log_show(
    pool: _Pool = "",
    state_dir: _State = "",
    since: Annotated[int, typer.Option(help="The first event's number.")] = 1,
    limit: Annotated[int, typer.Option(help="At most so many events.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print the events of a pool's log, also while the pool runs."""
    folder = newest_folder(state_root(state_dir), pool) / "log"
    for event in log.show(folder, since, limit):
        typer.echo(json.dumps(event) if as_json else logged_line(event))


@logs.command("verify")
def log_verify(
    pool: _Pool = "",
    state_dir: _State = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Read and replay a whole log. Exit code 0 if nothing that was acknowledged is lost."""
    folder = newest_folder(state_root(state_dir), pool) / "log"
    report = log.verify(folder)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        typer.echo(f"{folder}: {'in order' if report.ok else 'DAMAGED'}")
        typer.echo(
            f"{report.events} events ({report.first_seq} to {report.last_seq}) in "
            f"{report.segments} segments, checkpoints at {report.checkpoints or 'none'}"
        )
        for lost in (*report.lost, *report.lost_before):
            typer.echo(f"lost: events {lost}")
        for damage in report.damage:
            typer.echo(f"damage: {damage}")
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def version() -> None:
    """Print the versions of tabpool and of what it stands on."""
    for name, number in examination.machine().items():
        typer.echo(f"{name} {number}")


def main() -> None:
    """Entry point: the project's own errors are messages, not tracebacks."""
    try:
        app()
    except PoolError as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}[/red]: {error}", highlight=False)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
