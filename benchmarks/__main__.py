"""Run every benchmark: `python -m benchmarks [--quick] [--json DIRECTORY]`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = ("transport", "recovery", "levels", "scaling", "sharding", "breaker", "log")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="run fewer repeats")
    parser.add_argument("--json", type=Path, metavar="DIRECTORY", help="save reports there")
    options = parser.parse_args()
    worst = 0
    for name in NAMES:
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        command += ["--quick"] if options.quick else []
        if options.json:
            options.json.mkdir(parents=True, exist_ok=True)
            command += ["--json", str(options.json / f"{name}.json")]
        worst = max(worst, subprocess.run(command, check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
