"""`tabpool version`: versions, for a bug report."""

from __future__ import annotations

import typer

from pool.doctor import machine


def version() -> None:
    """Print the versions of tabpool and of its main dependencies."""
    for name, number in machine().items():
        typer.echo(f"{name} {number}")
