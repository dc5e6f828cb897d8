"""Several Ray nodes on this one machine, for faults that take a node: raylets that may be killed.

The nodes are Ray's own for tests (`ray.cluster_utils`). They are made in a process of their own,
which this module also is: Ray wants a main thread for them, and that of a pool's client is busy. It
obeys lines on its standard input and ends everything with that. This module must not know of pools.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ray
from ray.cluster_utils import Cluster

from actors.ray.starting import BROWSER_RESOURCE
from recovery.errors import SetupError

_NODE_CPUS = 2
_END_SECONDS = 30.0
_ADDRESS, _DONE, _FILL = "address", "done", "fill"


class LocalCluster:
    """A head node and others, each of which takes up to `browsers` browsers. Calls block."""

    def __init__(self, nodes: int, browsers: int) -> None:
        self._command = (sys.executable, "-m", __name__, str(nodes), str(browsers))
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Start all of them; returns the address that a pool joins. Raises `SetupError`."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the client, which needs the nodes to close
        )
        return self._heard(_ADDRESS)

    def fill_up(self) -> None:
        """Start a node for each that has died. Raises `SetupError`."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(f"{_FILL}\n")
            self._process.stdin.flush()
            self._heard(_DONE)

    def stop(self) -> None:
        """End every node, with all that runs there."""
        process, self._process = self._process, None
        if process is not None:
            try:
                process.communicate(timeout=_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _heard(self, word: str) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:  # Ray may write there, too
            first, _, rest = line.strip().partition(" ")
            if first == word:
                return rest
        raise SetupError("Ray's nodes on this machine could not be started: see what it printed")


class _Nodes:
    def __init__(self, count: int, browsers: int) -> None:
        self._count = count
        self._resources = {BROWSER_RESOURCE: browsers}
        head = {"num_cpus": _NODE_CPUS, "resources": self._resources, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self._others: list[Any] = []

    def fill_up(self) -> None:
        for node in [node for node in self._others if node.dead_processes()]:
            self._others.remove(node)
            self.cluster.remove_node(node, allow_graceful=False)  # what is left of it
        while len(self._others) < self._count - 1:
            added = self.cluster.add_node(num_cpus=_NODE_CPUS, resources=self._resources)
            self._others.append(added)


def main() -> None:
    """Make nodes, and obey, until there is nothing more to obey."""
    nodes = _Nodes(int(sys.argv[1]), int(sys.argv[2]))
    try:
        nodes.fill_up()
        _say(f"{_ADDRESS} {nodes.cluster.address}")
        for line in sys.stdin:
            if line.strip() == _FILL:
                nodes.fill_up()
                _say(_DONE)
    finally:
        ray.shutdown()
        nodes.cluster.shutdown()  # type: ignore[no-untyped-call]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
