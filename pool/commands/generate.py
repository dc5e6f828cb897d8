"""`tabpool generate`: text from a decoder that is sharded over several browsers, streamed.

The command line of `BrowserPool.load` and `stream`: it reads options, opens a pool, and prints.
This module must not choose a token or a browser, nor recover from a fault: it only shows it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from actors.driver.binaries import installed_kinds
from pool.commands.passage_view import (
    Kill,
    PassageDisplay,
    PlainText,
    Written,
    screen_or,
    write,
)
from pool.config import PoolConfig
from pool.models.bundled import kjv_llama_folder
from pool.models.registry import read_model
from pool.models.tokens import encoder_for
from pool.pool import BrowserPool
from recovery.errors import BadInput, SetupError
from recovery.kinds import BrowserType, Level, detect_browser_type
from recovery.levels import BROWSERS_NEEDED
from sharding.cutting.manifest import MANIFEST_NAME
from sharding.sequences.decoding import decoding_from
from sharding.sequences.stages import check_length

EPILOG = (
    'Example: `tabpool generate --shards 3 --prompt "In the beginning" --kill 20` cuts the llama '
    "that comes with tabpool into three shards, one for each of three browsers, and generates text "
    "with them. After 20 tokens the browser of the middle stage is killed (SIGKILL) and its stage "
    "is rebuilt in another browser. Run it again without --kill: with the same --seed the text is "
    "the same. The text goes to standard output; everything else goes to standard error, unless "
    "standard output is a terminal."
)

_MODEL = "model"  # its name in the pool
_PROMPT = "In the beginning"
_DEFAULT = PoolConfig()


def generate(
    model: Annotated[
        Path | None,
        typer.Option(
            help="A decoder with a KV cache and a tokenizer.json beside it: a folder, an .onnx "
            "file, or a folder written by `tabpool shard`. By default the llama that comes with "
            "tabpool, trained on the King James Bible."
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="Number of shards to cut the model into; by default one per browser."),
    ] = None,
    browsers: Annotated[
        str,
        typer.Option(
            help="Browsers and how many of each, such as chrome=1,firefox=1,safari=1. By default "
            "one of each that is installed."
        ),
    ] = "",
    level: Annotated[
        str,
        typer.Option(
            help="Recovery level of the pool: none, low, medium, high or critical. By default high "
            "if there are enough browsers, else medium."
        ),
    ] = "",
    strategy: Annotated[
        str, typer.Option(help="Order of recovery actions, as for BrowserPool(strategy=).")
    ] = _DEFAULT.strategy,
    backend: Annotated[
        str,
        typer.Option(
            help="Back end: auto, wasm, webgpu or webnn. Only wasm gives the same bits in all "
            "browsers."
        ),
    ] = "wasm",
    prompt: Annotated[str, typer.Option(help="The prompt.")] = _PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0: always the most likely token.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(help="Sample from the K most likely tokens; 0: from all.")
    ] = 50,
    top_p: Annotated[
        float, typer.Option(help="Sample from the fewest tokens whose probabilities sum to P.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Seed for sampling; the same seed gives the same tokens.")
    ] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue past the model's end-of-sequence token.")
    ] = False,
    kill: Annotated[
        int | None,
        typer.Option(
            help="Kill the browser of the middle stage (SIGKILL) after this many tokens, to test "
            "recovery."
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the result as JSON instead of the text."),
    ] = False,
) -> None:
    """Generate text with a model sharded over several browsers, and show its stages.

    Exit code 0 if the text was completed, 1 if the sequence was lost.
    """
    decoding = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "ignore_eos": ignore_eos,
    }
    decoding_from(decoding)  # invalid options are reported before any browser is started
    if kill is not None and not 1 <= kill < max_new_tokens:
        raise BadInput(
            f"--kill: expected a number of tokens from 1 to {max_new_tokens - 1} (one less than "
            f"--max-new-tokens), got {kill}.",
            expected=f"1 to {max_new_tokens - 1}",
            got=kill,
        )
    path = kjv_llama_folder() if model is None else model
    _check_model(path, prompt, max_new_tokens)
    kinds = parse_browsers(browsers) if browsers else _installed()
    total = sum(kinds.values())
    if shards is None and not (path / MANIFEST_NAME).is_file():
        shards = total
    if not level:
        level = str(Level.HIGH if total >= BROWSERS_NEEDED[Level.HIGH] else Level.MEDIUM)
    pool = BrowserPool(kinds, level=level, strategy=strategy, backend=backend)
    # Unless standard output is a terminal, it gets only the text.
    out = Console(stderr=as_json)
    notes = out if out.is_terminal else Console(stderr=True)
    display = screen_or(out, PassageDisplay() if as_json else PlainText(_write, _note_on(notes)))
    inputs = {"text": prompt, **decoding}
    kill_order = None if kill is None else Kill(kill)
    written = asyncio.run(_generate(pool, path, shards, inputs, display, kill_order, notes))
    if as_json:
        plain = as_plain(written, path, level, strategy)
        typer.echo(json.dumps(plain, indent=2, default=str))
    else:
        for line in summary(written, level):
            notes.print(line, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(0 if written.result is not None and written.result.success else 1)


async def _generate(
    pool: BrowserPool,
    path: Path,
    shards: int | None,
    inputs: Mapping[str, Any],
    display: PassageDisplay,
    kill: Kill | None,
    notes: Console,
) -> Written:
    # No spinner unless the notes go to a terminal.
    quiet = Console(stderr=True, quiet=not notes.is_terminal)
    try:
        with quiet.status("starting browsers ...") as status:
            await pool.open()
            status.update(f"cutting and loading {path} ...")
            await pool.load(_MODEL, path, shards=shards)
        return await write(pool, _MODEL, inputs, display, kill=kill)
    finally:
        with quiet.status("closing browsers ..."):
            await pool.close()


def parse_browsers(text: str) -> dict[str, int]:
    """Counts by browser from "chrome=2,firefox". Raises `BadInput`."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, mark, number = (piece.strip() for piece in part.partition("="))
        count = number if mark else "1"
        if not name or not count.isascii() or not count.isdigit():
            raise BadInput(
                f"--browsers: expected browsers and counts such as chrome=2,firefox=1, got "
                f"{text!r}.",
                expected="chrome=2,firefox=1",
                got=text,
            )
        kind = str(detect_browser_type(name))
        found[kind] = found.get(kind, 0) + int(count)
    return found


def _installed() -> dict[str, int]:
    kinds = installed_kinds()
    if not kinds:
        raise SetupError(
            f"found none of {', '.join(BrowserType)} with its driver on this machine. Run "
            "`tabpool doctor` to see what to install."
        )
    return {str(kind): 1 for kind in kinds}


def _check_model(path: Path, prompt: str, max_new_tokens: int) -> None:
    """Refuse a model that can't take this text prompt. Raises `NotAModel` or `BadInput`."""
    if (path / MANIFEST_NAME).is_file():  # the pool checks the rest when it loads it
        has_tokenizer = (path / "tokenizer.json").is_file()
    else:
        entry = read_model(_MODEL, path)
        encoder = encoder_for(entry)
        has_tokenizer = encoder is not None
        if encoder is not None:
            check_length(len(encoder.ids(prompt)), max_new_tokens, entry.positions_max)
    if not has_tokenizer:
        raise BadInput(
            f"{path}: no tokenizer.json beside it, so --prompt can't be encoded. Put the model's "
            "tokenizer.json there, or use BrowserPool.stream with input_ids.",
            expected="tokenizer.json",
            got="none",
        )


def _write(text: str) -> None:
    typer.echo(text, nl=False)


def _note_on(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


# -- results ---------------------------------------------------------------------------------------


def summary(written: Written, level: str) -> Sequence[str]:
    """The result as lines of text."""
    result = written.result
    assert result is not None
    numbers = result.metrics
    seconds, first = numbers["duration_ms"] / 1e3, numbers["first_token_ms"] / 1e3
    rate = numbers["tokens_per_second"]
    count = len(written.tokens)
    lines = [
        f"{count} tokens in {seconds:.2f} s: {rate:.1f} tokens/s, the first after {first:.2f} s"
    ]
    if written.killed is not None:
        lines.append(
            f"killed (--kill) after {written.killed.after} tokens: {written.killed.browser_id} "
            f"(stage {written.killed.stage}, pid {written.killed.pid})"
        )
    failed = {str(step.failure.ref) for step in written.view.recovery if step.failure}
    lines.append(f"failed: {', '.join(sorted(failed)) or 'none'}; rebuilt: {len(written.rebuilt)}")
    effective = str(result.level_effective)
    if not result.success:
        lines.append(f"LOST: {result.error}")
    elif effective == level:
        lines.append(f"level: {level}")
    else:
        lines.append(f"level: {level} requested, {effective} at the end")
    return lines


def as_plain(written: Written, model: Path, level: str, strategy: str) -> dict[str, Any]:
    """The result as plain data, for JSON."""
    result = written.result
    assert result is not None
    return {
        "model": os.fspath(model),
        "success": result.success,
        "error": result.error,
        "prompt": written.prompt,
        "text": written.text,
        "tokens": [token.id for token in written.tokens],
        "level": level,
        "level_effective": str(result.level_effective),
        "strategy": strategy,
        "stages": [
            {
                "layers": stage.layers,
                "browsers": [str(ref) for ref in stage.where],
                "kinds": [written.browsers.get(ref.browser_id, "") for ref in stage.where],
                "position": stage.position,
            }
            for stage in written.view.stages
        ],
        "killed": None if written.killed is None else asdict(written.killed),
        "recovery": [
            {**asdict(step), "failure": step.failure and str(step.failure)}
            for step in written.view.recovery
        ],
        "rebuilt": len(written.rebuilt),
        "metrics": dict(result.metrics),
    }
