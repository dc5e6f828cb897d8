"""A page takes steps by the same rules as `sharding.sequences.caches.SequenceCaches`, order for
order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.messages import RunRequest
from recovery.errors import PageError
from recovery.kinds import Backend, BrowserType
from recovery.records import HostRef
from sharding.cutting.cut import cut
from sharding.sequences.caches import DELTA, StepOrder
from sharding.sequences.native_stages import NativeStage
from sharding.sequences.stages import pipeline_of_manifest, stage_specs
from tests.browser.conftest import ENGINES, launched
from tests.unit.test_pipeline import DECODERS, PROMPT

ATOL = 1e-5  # float32 kernels of WASM against native ones: measured 6e-7
Script = list[tuple[str, StepOrder, str]]  # what it is, the order, which tensors go with it


def step(position: int, tokens: int = 1, fence: int = 1, sequence: str = "s") -> StepOrder:
    return StepOrder(sequence, "step", fence, position, tokens, 0, deltas=True)


SCRIPT: Script = [
    ("a prompt", step(0, 5), "prompt"),
    ("the same again, after its answer was lost", step(0, 5), "prompt"),
    ("the next token", step(5), "token"),
    ("one that skips a position", step(7), "token"),
    ("an older one, reordered or sent twice", step(0, 5), "prompt"),
    ("the last one again", step(5), "token"),
    ("a newer fence that does not begin anew", step(6, fence=2), "token"),
    ("a newer fence that does", step(0, 5, fence=2), "prompt"),
    ("a frame from before the rebuild", step(6, fence=1), "token"),
    ("another sequence in its middle", step(3, sequence="t"), "token"),
    ("caches that are not whole", StepOrder("s", "restore", 3, 6), "caches of 5"),
    ("caches under the present fence", StepOrder("s", "restore", 2, 5), "caches of 5"),
    ("caches under a new fence", StepOrder("s", "restore", 3, 5), "caches of 5"),
    ("a token on them", step(5, fence=3), "token"),
    ("to forget", StepOrder("s", "forget", 3), ""),
    ("a token after that", step(6, fence=3), "token"),
]
REFUSED = ["", "", "", "out_of_step", "out_of_step", "", "out_of_step", "", "stale_step"]
REFUSED += ["out_of_step", "out_of_step", "out_of_step", "", "", "", "out_of_step"]


@pytest.mark.parametrize("kind", ENGINES)
async def test_page_and_python_take_and_refuse_the_same(kind: BrowserType, tmp_path: Path) -> None:
    manifest = cut(DECODERS / "builder-llama.onnx", [(0, 3)], tmp_path)
    pipeline = pipeline_of_manifest("m", manifest)
    (spec,) = stage_specs("m", tmp_path, manifest)
    (stage,) = pipeline.stages
    native = NativeStage(stage, spec)
    native.open()
    ref = HostRef(f"{kind}-0", 0)
    async with launched(kind) as (host, _):
        await host.load(ref, 1, spec, (Backend.WASM,))
        inputs: dict[str, Mapping[str, Any]] = {
            "prompt": pipeline.inputs_of_step(PROMPT, 0),
            "token": pipeline.inputs_of_step([9], 5),
            "": {},
        }
        for number, (what, order, tensors) in enumerate(SCRIPT):
            try:
                right, refused = native.take(order, inputs[tensors]), ""
            except PageError as error:
                right, refused = {}, error.fields["what"]
            assert refused == REFUSED[number], what
            request = RunRequest(f"op{number}", ref, spec.name, 30.0, stage=order)
            reply = await host.run(request, inputs[tensors])
            if refused:
                assert reply.failure is not None, what
                assert reply.failure.evidence["what"] == refused, what
                continue
            assert reply.answered, (what, reply.failure)
            assert reply.outputs.keys() == right.keys(), what
            # By score: the ids are in the order of scores, and near ties fall either way.
            got, expected = (
                (
                    dict(zip(a["choice/ids"], a["choice/scores"], strict=True))
                    for a in (reply.outputs, right)
                )
                if right
                else ({}, {})
            )
            for token, score in expected.items():
                assert abs(got[token] - score) < ATOL, what
            deltas = {name: array for name, array in right.items() if name.startswith(DELTA)}
            for name, array in deltas.items():
                np.testing.assert_allclose(reply.outputs[name], array, atol=ATOL)
            if what == "a prompt":
                inputs["caches of 5"] = {n.removeprefix(DELTA): a for n, a in deltas.items()}
    native.close()
