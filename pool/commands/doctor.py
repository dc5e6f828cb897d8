"""`tabpool doctor`: which browsers of this machine work, as a table or as JSON.

The command line of `pool.doctor`. This module must not launch anything itself.
"""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pool import doctor as machine_doctor
from recovery.kinds import BrowserType, detect_browser_type


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    browsers: Annotated[
        str, typer.Option(help="Check only these, separated by commas: chrome,firefox,safari,edge.")
    ] = "",
    headed: Annotated[bool, typer.Option("--headed", help="Show the browsers' windows.")] = False,
) -> None:
    """Launch every installed browser and show its version, back ends and start-up time.

    Exit code 0 if a pool can run on this machine, 1 if no browser is usable.
    """
    kinds = [detect_browser_type(name) for name in browsers.split(",") if name] or list(BrowserType)
    console = Console(stderr=as_json)

    async def launch_all() -> list[machine_doctor.Finding]:
        found = []
        with console.status("") as status:
            names = iter(kinds)
            status.update(f"launching {next(names)} ...")
            async for finding in machine_doctor.launch_each(kinds, headless=not headed):
                found.append(finding)
                following = next(names, None)
                if following:
                    status.update(f"launching {following} ...")
        return found

    findings = asyncio.run(launch_all())
    if as_json:
        typer.echo(json.dumps(machine_doctor.as_json(findings), indent=2, default=str))
    else:
        _show(console, findings)
    raise typer.Exit(0 if machine_doctor.verdict(findings) else 1)


def _show(console: Console, findings: list[machine_doctor.Finding]) -> None:
    table = Table(title="browsers on this machine")
    for column in ("type", "product", "WASM", "WebGPU adapter", "WebNN", "ready in", "usable"):
        table.add_column(column)
    for finding in findings:
        table.add_row(*machine_doctor.as_row(finding))
    console.print(table)
    for finding in findings:
        for line in (finding.problem, *finding.hints):
            if line:
                console.print(
                    f"  {finding.browser}: {line}", highlight=False, markup=False, soft_wrap=True
                )
    machine = machine_doctor.machine()
    console.print(", ".join(f"{k} {v}" for k, v in machine.items() if k != "executable"))
    if machine_doctor.verdict(findings):
        usable = ", ".join(str(f.browser) for f in findings if f.usable)
        console.print(f"[green]A pool can run here[/green] with: {usable}")
    else:
        console.print("[red]No browser here is usable[/red]; what to install is listed above.")
