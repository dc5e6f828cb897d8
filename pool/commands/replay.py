"""`tabpool replay`: run the operation of a failure bundle again.

An operation of a chaos run is replayed with the same faults before it, any other one alone. This
module must not diagnose the failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from pool.bundles import Bundle, made_up, read_bundle
from pool.commands.chaos import chaos_again
from pool.pool import BrowserPool
from pool.results import Result
from recovery.errors import BadInput

EPILOG = (
    "Example: `tabpool chaos --ops 200 --report out` writes out/bundles/operation-17.zip for an "
    "operation that failed or was answered wrong; `tabpool replay out/bundles/operation-17.zip` "
    "repeats the first 18 operations, with the same faults. In a program, "
    "`await pool.bundle(result, inputs, PATH)` writes a bundle of any operation. Exit code 0 if "
    "the operation succeeds this time, 1 if it fails again."
)


def replay(
    bundle: Annotated[Path, typer.Argument(help="The bundle, a .zip file.")],
    model: Annotated[Path | None, typer.Option(help="Path of the model, if it has moved.")] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help="An .npz file with the inputs by name, for a bundle without data."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Describe the bundle and exit.")] = False,
) -> None:
    """Run the operation of a failure bundle again."""
    console, found = Console(), read_bundle(bundle)
    _describe(console, found)
    if show:
        return
    chaos = found.facts.get("chaos")
    if chaos:
        raise typer.Exit(chaos_again(console, chaos))
    operation_inputs = _inputs(console, found, inputs)
    result = asyncio.run(_again(found, model, operation_inputs))
    if result.success:
        console.print(f"[green]answered[/green] by {result.browser_id}", highlight=False)
    else:
        console.print(f"[red]failed again[/red]: {result.error}", highlight=False)
    for step in result.recovery:
        console.print(f"  {step.what} {step.where}: {step.outcome}", highlight=False, markup=False)
    raise typer.Exit(0 if result.success else 1)


def _describe(console: Console, bundle: Bundle) -> None:
    facts = bundle.facts
    operation, result, model = facts["operation"], facts["result"], facts["model"]
    files = [*sorted(bundle.files), *(["inputs.npz"] if bundle.inputs is not None else [])]
    lines = [
        f"{facts['why']}: {operation['op']} on {operation['model']} ({operation['op_id']})",
        f"  error: {result['error'] or 'none'}",
        f"  first failure: {result['original_error'] or 'none'}",
        f"  model: {model['path']}, sha256 {model['digest'][:16]}",
        f"  pool: {facts['pool'].get('browsers')} at level {facts['pool'].get('level')}",
        f"  files: {', '.join(files) or 'none'}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _inputs(console: Console, bundle: Bundle, path: Path | None) -> Mapping[str, Any]:
    if path is not None:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError) as error:
            raise BadInput(f"--inputs {path} can't be read: {error}") from error
    if bundle.inputs is not None:
        return bundle.inputs
    console.print(
        "[yellow]The bundle holds no data: using generated inputs of the same names and shapes. "
        "Pass the original ones with --inputs FILE.npz.[/yellow]"
    )
    return made_up(bundle.facts["operation"]["inputs"])


async def _again(bundle: Bundle, path: Path | None, inputs: Mapping[str, Any]) -> Result:
    facts, model = bundle.facts, bundle.facts["model"]
    operation = facts["operation"]
    async with BrowserPool(**facts["pool"]) as pool:
        entry = await pool.load(
            model["name"],
            path or model["path"],
            shards=model["shards"],
            strategy=model["strategy"],
        )
        if entry.spec.digest != model["digest"]:
            raise BadInput(
                f"{path or model['path']} is not the model of the bundle: expected sha256 "
                f"{model['digest']}, got {entry.spec.digest}. Pass the right one with --model.",
                expected=model["digest"],
                got=entry.spec.digest,
            )
        return await pool.run_with_recovery(operation["model"], operation["op"], inputs)
