"""`tabpool generate`: text from a llama that is cut over several browsers, as it is written.

A face on `BrowserPool.load` and `stream`: it reads options, opens a pool, and prints. This module
must not choose a token or a browser, and does nothing about a fault but to show it.
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
    PlainText,
    Shown,
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
    "that comes with tabpool into three shards, one for each of three browsers, and has them write "
    "together. After 20 tokens the browser of the middle stage is killed (SIGKILL): watch its "
    "stage being rebuilt in another one. Run it again without --kill: with the same --seed the "
    "text is the same. The text goes to standard output, everything else, where that is no "
    "terminal, to standard error."
)

_MODEL = "model"  # what it is called in the pool
_PROMPT = "In the beginning"
_DEFAULT = PoolConfig()


def generate(
    model: Annotated[
        Path | None,
        typer.Option(
            help="A decoder with a cache and a tokenizer.json beside it: a folder, an .onnx file, "
            "or a folder that `tabpool shard` made. By default the llama that comes with tabpool, "
            "which writes like the King James Bible."
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="Into how many to cut the model; by default one for each browser."),
    ] = None,
    browsers: Annotated[
        str,
        typer.Option(
            help="Which browsers, and how many of each: chrome=1,firefox=1,safari=1. By default "
            "one of each that is installed."
        ),
    ] = "",
    level: Annotated[
        str,
        typer.Option(
            help="What is kept ready before anything fails: none, low, medium, high or critical. "
            "By default high where there are browsers for it, else medium."
        ),
    ] = "",
    strategy: Annotated[
        str, typer.Option(help="The order of recovery actions, as BrowserPool takes it.")
    ] = _DEFAULT.strategy,
    backend: Annotated[
        str,
        typer.Option(
            help="auto, wasm, webgpu or webnn. Only wasm gives the same bits in every browser."
        ),
    ] = "wasm",
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = _PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest token; higher: more chance.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(help="Draw from the so many likeliest tokens only; 0: from all.")
    ] = 50,
    top_p: Annotated[
        float, typer.Option(help="Draw from the fewest tokens whose chances sum to this.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same tokens.")] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the model's own end of text.")
    ] = False,
    kill: Annotated[
        int | None,
        typer.Option(
            help="After so many tokens, SIGKILL the browser of the middle stage, to see what "
            "comes of it."
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the final account as JSON, in place of the text."),
    ] = False,
) -> None:
    """Write a text with a model that is cut over several browsers, and watch its stages.

    Exit code 0 if the text was finished, 1 if it was lost on the way.
    """
    decoding = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "ignore_eos": ignore_eos,
    }
    decoding_from(decoding)  # what is wrong is said before any browser is started
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
    # Where the text must be alone, everything else is for standard error.
    out = Console(stderr=as_json)
    notes = out if out.is_terminal else Console(stderr=True)
    shown = screen_or(out, Shown() if as_json else PlainText(_write, _note_on(notes)))
    ask = {"text": prompt, **decoding}
    cause = None if kill is None else Kill(kill)
    written = asyncio.run(_generate(pool, path, shards, ask, shown, cause, notes))
    if as_json:
        plain = account(written, path, level, strategy)
        typer.echo(json.dumps(plain, indent=2, default=str))
    else:
        for line in summary(written, level):
            notes.print(line, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(0 if written.result is not None and written.result.success else 1)


async def _generate(
    pool: BrowserPool,
    path: Path,
    shards: int | None,
    ask: Mapping[str, Any],
    shown: Shown,
    kill: Kill | None,
    notes: Console,
) -> Written:
    # A spinner in a file would be a line of noise.
    quiet = Console(stderr=True, quiet=not notes.is_terminal)
    try:
        with quiet.status("starting browsers ...") as status:
            await pool.open()
            status.update(f"cutting and loading {path} ...")
            await pool.load(_MODEL, path, shards=shards)
        return await write(pool, _MODEL, ask, shown, kill=kill)
    finally:
        with quiet.status("closing browsers ..."):
            await pool.close()


def parse_browsers(text: str) -> dict[str, int]:
    """How many of each browser "chrome=2,firefox" asks for. Raises `BadInput`."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, mark, number = (piece.strip() for piece in part.partition("="))
        count = number if mark else "1"
        if not name or not count.isascii() or not count.isdigit():
            raise BadInput(
                f"--browsers: expected kinds and numbers such as chrome=2,firefox=1, got {text!r}.",
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
            f"none of {', '.join(BrowserType)} is installed here, or none with its driver: "
            "`tabpool doctor` names what to install."
        )
    return {str(kind): 1 for kind in kinds}


def _check_model(path: Path, prompt: str, max_new_tokens: int) -> None:
    """Refuse what can't go on with this prompt as text. Raises `NotAModel` or `BadInput`."""
    if (path / MANIFEST_NAME).is_file():  # the rest is for the pool to say, which reads it
        speaks = (path / "tokenizer.json").is_file()
    else:
        entry = read_model(_MODEL, path)
        encoder = encoder_for(entry)
        speaks = encoder is not None
        if encoder is not None:
            check_length(len(encoder.ids(prompt)), max_new_tokens, entry.positions_max)
    if not speaks:
        raise BadInput(
            f"{path} has no tokenizer.json beside it, so it takes no --prompt. Put the model's "
            "tokenizer.json there, or use BrowserPool.stream with input_ids.",
            expected="tokenizer.json",
            got="none",
        )


def _write(text: str) -> None:
    typer.echo(text, nl=False)


def _note_on(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


# -- what came of it -------------------------------------------------------------------------------


def summary(written: Written, level: str) -> Sequence[str]:
    """What there is to say in the end, as lines."""
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
            f"killed on purpose after {written.killed.after} tokens: {written.killed.browser_id} "
            f"(stage {written.killed.stage}, pid {written.killed.pid})"
        )
    failed = {str(step.failure.ref) for step in written.view.recovery if step.failure}
    lines.append(f"failed: {', '.join(sorted(failed)) or 'none'}; rebuilt: {len(written.rebuilt)}")
    held = str(result.level_effective)
    if not result.success:
        lines.append(f"LOST: {result.error}")
    elif held == level:
        lines.append(f"level {level} held")
    else:
        lines.append(f"level {level} asked, {held} held in the end")
    return lines


def account(written: Written, model: Path, level: str, strategy: str) -> dict[str, Any]:
    """The same for a program, and more of it: plain data."""
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
