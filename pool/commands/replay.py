"""`tabpool replay`: run the operation of a failure bundle again.

An operation of a chaos run is replayed with the same faults before it, any other one alone. A
bundle may be anybody's: `pool.replaying` says what of it is used. This module must not diagnose the
failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pool.bundles import Bundle, read_bundle, read_inputs
from pool.commands.chaos import chaos_again
from pool.commands.printing import print_plain, shown
from pool.pool import BrowserPool
from pool.replaying import ReplayOrder, made_up, order_from, verified_path
from pool.results import Result
from recovery.errors import BadInput

_LISTED_MAX = 20  # files, and options, in the description
EPILOG = (
    "Example: `tabpool chaos --ops 200 --report out` writes out/bundles/operation-17.zip for an "
    "operation that failed or was answered wrong; `tabpool replay out/bundles/operation-17.zip` "
    "repeats the first 18 operations, with the same faults. In a program, "
    "`await pool.bundle(result, inputs, PATH)` writes a bundle of any operation. A bundle may be "
    "anybody's: of its pool only harmless options are used, and its model is loaded only if you "
    "pass it with --model, or agree to the path that is shown and the same files are still there. "
    "Exit code 0 if the operation succeeds this time, 1 if it fails again."
)


def replay(
    bundle: Annotated[Path, typer.Argument(help="The bundle, a .zip file.")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Path of the model. By default that of the bundle, if you agree to it and its "
            "files are those of the bundle."
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help="An .npz file with the inputs by name, for a bundle without data."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Describe the bundle and exit.")] = False,
) -> None:
    """Run the operation of a failure bundle again."""
    console, found = Console(), read_bundle(bundle, contents=False)
    _describe(console, found)
    if show:
        return
    chaos = found.facts.get("chaos")
    if chaos:
        raise typer.Exit(chaos_again(console, chaos, model))
    order = order_from(found.facts)
    if order.ignored:
        few = ", ".join(order.ignored[:_LISTED_MAX])
        print_plain(console, f"Not used of the bundle's pool: {few}", style="yellow")
    path = model or _agreed_path(order)
    operation_inputs = _inputs(console, order, bundle, found, inputs)
    result = asyncio.run(_again(order, path, operation_inputs))
    if result.success:
        print_plain(console, f"answered by {result.browser_id}", style="green")
    else:
        print_plain(console, f"failed again: {result.error}", style="red")
    for step in result.recovery:
        print_plain(console, f"  {step.what} {step.where}: {step.outcome}")
    raise typer.Exit(0 if result.success else 1)


def _describe(console: Console, bundle: Bundle) -> None:
    """Says what is in a bundle, of which nothing is checked yet but that it is one."""
    facts = bundle.facts
    operation, result, model, pool = (
        facts[part] for part in ("operation", "result", "model", "pool")
    )
    asked = f"{operation.get('op')} on {operation.get('model')} ({operation.get('op_id')})"
    of_model = f"{model.get('path')}, sha256 {shown(model.get('digest'), 16)}"
    few = list(bundle.listed[:_LISTED_MAX])
    more = len(bundle.listed) - len(few)
    files = ", ".join([*few, *([f"{more} more"] if more else [])])
    lines = [
        f"{facts.get('why')}: {asked}",
        f"  error: {result.get('error') or 'none'}",
        f"  first failure: {result.get('original_error') or 'none'}",
        f"  model: {of_model}",
        f"  pool: {pool.get('browsers')} at level {pool.get('level')}",
        f"  files: {files or 'none'}",
    ]
    chaos = facts.get("chaos")
    if isinstance(chaos, dict):
        lines.append(f"  chaos run up to operation {chaos.get('number')}: {chaos.get('settings')}")
    for line in lines:
        print_plain(console, line)


def _agreed_path(order: ReplayOrder) -> Path:
    """The bundle's own path of the model, if the user agrees to it. Raises `BadInput`."""
    try:
        where = shown(Path(order.path).absolute())
        agreed = bool(order.path) and typer.confirm(f"Load the model from {where}?")
    except typer.Abort:  # nobody is there to answer
        agreed = False
    if not agreed:
        raise BadInput(
            "the model was not loaded: pass the path of one that you trust with --model.",
            expected="--model",
            got=order.path,
        )
    return verified_path(order)


def _inputs(
    console: Console, order: ReplayOrder, path: Path, bundle: Bundle, given: Path | None
) -> Mapping[str, Any]:
    if given is not None:
        return read_inputs(given)
    if "inputs.npz" in bundle.listed:
        found = read_bundle(path).inputs
        if found is not None:
            return found
    console.print(
        "[yellow]The bundle holds no data: using generated inputs of the same names and shapes. "
        "Pass the original ones with --inputs FILE.npz.[/yellow]"
    )
    return made_up(order.inputs)


async def _again(order: ReplayOrder, path: Path, inputs: Mapping[str, Any]) -> Result:
    # Nothing of it is kept: an operation of others is no sample of this machine's history.
    async with BrowserPool(**order.options, history=False, dashboard=False) as pool:
        entry = await pool.load(order.loaded_as, path, shards=order.shards, strategy=order.strategy)
        if entry.spec.digest != order.digest:
            raise BadInput(
                f"{path} is not the model of the bundle: expected sha256 {order.digest}, got "
                f"{entry.spec.digest}. Pass the right one with --model.",
                expected=order.digest,
                got=entry.spec.digest,
            )
        return await pool.run_with_recovery(order.model, order.op, inputs)
