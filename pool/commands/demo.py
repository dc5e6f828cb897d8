"""`tabpool demo`: the demonstration, see `pool.demo`."""

from __future__ import annotations

import typer


def demo() -> None:
    """Embed sentences and write a passage in real browsers that are killed on the way."""
    from pool.demo.demo import main as demonstrate

    raise typer.Exit(demonstrate())
