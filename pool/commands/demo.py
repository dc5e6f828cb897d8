"""`tabpool demo`: the demonstration, see `pool.demo`."""

from __future__ import annotations

import typer


def demo() -> None:
    """Embed sentences and generate text in real browsers while some are killed."""
    from pool.demo.demo import main as demonstrate

    raise typer.Exit(demonstrate())
