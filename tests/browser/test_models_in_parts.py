"""Models in parts on real browsers: a page read by two of them, and an encoder cut in two.

Stages of an encoder are compared bit for bit with the uncut model in the same engine: in these two
the runtime fuses nothing across the cut. Where it does, `tests.unit.test_components` says how far.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.faults import kill_process
from pool import BrowserPool
from pool.models.bundled import minilm_folder, ocr_folder
from recovery.errors import BadInput, NotAModel, UnknownModel
from recovery.kinds import BrowserType
from tests.browser.conftest import LIMIT, eventually, repaired, require
from tests.unit.test_cut import DECODERS
from tests.unit.test_reading import PAGE, distance, read_png

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.chaos]
DETECTOR, RECOGNISER = "ocr@ch_PP-OCRv4_det_infer", "ocr@ch_PP-OCRv4_rec_infer"
WANTED = (PAGE / "page.txt").read_text(encoding="utf-8").splitlines()
IMAGE = np.repeat(read_png(PAGE / "page.png")[:, :, np.newaxis], 3, axis=2)
TOP = IMAGE[:230]  # its first three lines
TEXTS = ["A cat sits on the mat.", "The central bank raised interest rates."]


def accuracy(text: list[str]) -> float:
    read, wanted = "\n".join(text), "\n".join(WANTED)
    return 1 - distance(read, wanted) / len(wanted)


def pool_of(tmp_path: Path, browsers: dict[str, int], **options: Any) -> BrowserPool:
    for kind in browsers:
        require(BrowserType(kind))
    settings = {"backend": "wasm", "restart_limit": LIMIT, "state_dir": str(tmp_path), **options}
    return BrowserPool(browsers, **settings)


def holder(pool: BrowserPool, part: str) -> Any:
    (host,) = [host for host in pool.hosts() if host.can_take(part)]
    return host


async def test_page_is_read_by_two_browsers_one_of_which_dies_in_between(tmp_path: Path) -> None:
    async with pool_of(tmp_path, {"chrome": 2}, level="medium") as pool:
        entry = await pool.load("ocr", ocr_folder(), strategy="component_based")
        assert {DETECTOR, RECOGNISER} < set(entry.parts)
        detects, reads = (holder(pool, part).ref.browser_id for part in (DETECTOR, RECOGNISER))
        assert detects != reads
        served = sum(host.served for host in pool.hosts())
        for wrong in ({}, {"image": IMAGE.astype(np.float32)}, {"image": IMAGE, "a": 1}):
            with pytest.raises(BadInput):
                await pool.run_with_recovery("ocr", "read", wrong)
        with pytest.raises(BadInput, match="only 'read'"):
            await pool.run_with_recovery("ocr", "inference", {"x": IMAGE})
        assert sum(host.served for host in pool.hosts()) == served

        right = await pool.run_with_recovery("ocr", "read", {"image": TOP})
        assert right.outputs["text"] == WANTED[:3]
        assert right.outputs["boxes"].shape == (3, 4)
        assert right.outputs["confidence"].min() > 0.9
        assert right.stages == (detects, reads)
        assert right.recovery == ()
        assert right.metrics["attempts"] == 1 + 3

        launch = (await pool.state()).launches[reads]
        while holder(pool, RECOGNISER).queue:  # what it said of itself a moment ago
            await pool.changed(0.01)
        reading = asyncio.create_task(pool.run_with_recovery("ocr", "read", {"image": IMAGE}))
        while not holder(pool, RECOGNISER).queue:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        kill_process(launch, "browser")  # lines are found, and some of them under way
        result = await reading
        assert result.recovered
        assert "failed" in [step.what for step in result.recovery]
        assert all(RECOGNISER in step.where for step in result.recovery)
        assert accuracy(result.outputs["text"]) >= 0.95
        assert result.outputs["boxes"].shape == (len(WANTED), 4)
        assert result.stages[0] == detects
        await repaired(pool, reads)

        # Another client knows it, and each component by its own name.
        other = BrowserPool.attach(pool.name)
        async with other:
            assert other.models() == ("ocr",)
            again = await other.run_with_recovery("ocr", "read", {"image": TOP})
            assert again.outputs["text"] == WANTED[:3]
            line = {"x": np.zeros((1, 3, 48, 320), np.float32)}
            alone = await other.run_with_recovery(RECOGNISER, "inference", line)
            assert [array.shape[-1] for array in alone.outputs.values()] == [6625]
            with pytest.raises(UnknownModel, match="has no component"):
                await other.run_with_recovery("ocr@none", "inference", line)
            await pool.unload("ocr")

            async def forgotten() -> bool:
                await other.changed(0.05)
                return other.models() == ()

            await eventually(forgotten)
        assert (await pool.control()).models == {}
        await pool.load("ocr", ocr_folder(), strategy="component_based")
        last = await pool.run_with_recovery("ocr", "read", {"image": TOP})
        assert last.outputs["text"] == WANTED[:3]


async def test_cut_encoder_answers_as_the_uncut_one_and_survives_a_stage(tmp_path: Path) -> None:
    ids = np.arange(1, 9, dtype=np.int64).reshape(1, 8)
    tokens = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    asked: dict[str, tuple[Path, str, dict[str, Any]]] = {
        "minilm": (minilm_folder(), "embed", {"text": TEXTS}),
        "optimum-bert": (DECODERS / "optimum-bert.onnx", "inference", tokens),
    }
    async with pool_of(tmp_path, {"chrome": 2}, level="medium") as pool:
        for name, (path, op, inputs) in asked.items():
            entry = await pool.load("uncut", path)
            if op == "inference" and "token_type_ids" in [spec.name for spec in entry.spec.inputs]:
                inputs["token_type_ids"] = np.zeros_like(ids)
            right = await pool.run_with_recovery("uncut", op, inputs)
            await pool.unload("uncut")
            cut = await pool.load("cut", path, shards=2)
            assert cut.parts == ("cut@0", "cut@1")
            stages = tuple(holder(pool, part).ref.browser_id for part in cut.parts)
            result = await pool.run_with_recovery("cut", op, inputs)
            assert result.stages == stages
            assert len(set(stages)) == 2
            assert result.metrics["attempts"] == 2
            assert result.outputs.keys() == right.outputs.keys()
            for key, array in right.outputs.items():
                assert result.outputs[key].tobytes() == array.tobytes()
            with pytest.raises(BadInput):
                await pool.run_with_recovery("cut", op, {"input_ids": [[0.5]]})
            with pytest.raises(NotAModel, match="can't generate"):
                await pool.run_with_recovery("cut", "generate", {"input_ids": ids})
            if name == "minilm":
                kill_process((await pool.state()).launches[stages[1]], "browser")
                again = await pool.run_with_recovery("cut", op, inputs)
                assert again.outputs["embedding"].tobytes() == right.outputs["embedding"].tobytes()
                await repaired(pool, stages[1])
            await pool.unload("cut")
