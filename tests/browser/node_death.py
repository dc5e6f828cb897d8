"""Two nodes of one Ray cluster, one killed under load: run by `test_nodes`, in its own process.

Prints one line of JSON. The cluster is Ray's own for tests: several raylets on this machine.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from actors.ray.connection import this_node
from pool import BrowserPool, Result
from pool.models.bundled import kjv_llama_folder, silero_vad_path
from recovery.control import Phase
from recovery.faults import Fault, FaultKind, Injected, Intensity
from tests.browser.conftest import FRAME

LEASE = 8.0  # shorter ones are lost on a busy machine while browsers start
OPERATIONS = 300
WRITE = {"text": "And the LORD said", "max_new_tokens": 24, "ignore_eos": True, "logits": True}


async def story(cluster: Cluster, second: Any, folder: str) -> dict[str, Any]:
    async with BrowserPool(
        {"chrome": 2},
        level="high",
        backend="wasm",
        address=cluster.address,
        lease=LEASE,
        hedge_seconds=0.5,
        state_dir=folder,
        faults=True,
    ) as pool:
        await pool.load("vad", silero_vad_path(), example=FRAME)
        before = await pool.state()
        nodes = {browser_id: report.node for browser_id, report in before.launches.items()}
        first = await pool.run_with_recovery("vad", "inference", FRAME)
        await pool.load("llama", kjv_llama_folder(), shards=2)
        text = await pool.run_with_recovery("llama", "generate", WRITE)
        texts: list[Result] = []
        over = False

        async def write() -> None:
            while not over:
                texts.append(await pool.run_with_recovery("llama", "generate", WRITE))

        writing = asyncio.create_task(write())
        killed, noticed = 0.0, 0.0
        made: Injected | None = None
        away = next(name for name, node in nodes.items() if node != this_node())
        results = []

        async def ask(number: int) -> None:
            results.append(await pool.run_with_recovery("vad", "inference", FRAME))

        async def watch() -> None:
            nonlocal noticed
            while not noticed:
                for record in (await pool.control()).browsers.values():
                    if record.phase is not Phase.READY:
                        noticed = time.monotonic()
                await asyncio.sleep(0.05)

        pending = set()
        watching = None
        for number in range(OPERATIONS):
            pending.add(asyncio.create_task(ask(number)))
            await asyncio.sleep(0.03)
            if number == OPERATIONS // 3:
                killed = time.monotonic()
                watching = asyncio.create_task(watch())
                made = await pool.inject_fault(Fault(FaultKind.NODE_DEATH, Intensity.SEVERE, away))
        await asyncio.gather(*pending)
        over = True
        await writing
        assert watching is not None
        async with asyncio.timeout(4 * LEASE):
            await watching
        right = first.outputs["output"]
        assert made is not None
        raylets = [
            int(process.pid) for kind, process in second.dead_processes() if kind == "raylet"
        ]
        state = await pool.control()
        repairs = [*state.repairs, *filter(None, [state.browsers[away].repair])]
        failures = [repair.failure for repair in repairs if repair.browser_id == away]
        return {
            "nodes": len(set(nodes.values())),
            "raylet_killed": list(made.pids) == raylets,
            "noticed_as": [str(failure.category) for failure in failures],
            "asked": OPERATIONS,
            "answered": sum(result.success for result in results),
            "right": sum(
                result.success and np.array_equal(result.outputs["output"], right)
                for result in results
            ),
            "recovered": sum(result.recovered for result in results),
            "slowest_ms": max(result.metrics["duration_ms"] for result in results),
            "texts": len(texts),
            "texts_right": sum(
                result.success
                and np.array_equal(result.outputs["tokens"], text.outputs["tokens"])
                and np.array_equal(result.outputs["logits"], text.outputs["logits"])
                for result in texts
            ),
            # A call to a node that is gone may only be slow: then another browser is asked.
            "texts_struck": sum(bool(result.recovery) for result in texts),
            "noticed_seconds": noticed - killed,
            "lease": LEASE,
        }


def main() -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "resources": {"tabpool_browser": 1}},
    )
    second = cluster.add_node(num_cpus=2, resources={"tabpool_browser": 1})
    try:
        sys.stdout.write(json.dumps(asyncio.run(story(cluster, second, sys.argv[1]))) + "\n")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
