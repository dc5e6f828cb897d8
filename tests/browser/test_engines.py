"""Every engine, launched for real, computes what native onnxruntime computes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from actors.browser.host import BrowserHost
from actors.driver.arguments import Gpu
from actors.driver.profiles import cache_root
from actors.messages import RunRequest
from pool.models.bundled import minilm_folder, ocr_detector_path, silero_vad_path
from pool.models.registry import read_model
from recovery.errors import BrowserLost, LaunchFailed, PageError
from recovery.kinds import Backend, BrowserType
from recovery.records import HostRef
from sharding.models.frames import HEADER_BYTES_MAX, TENSORS_MAX
from sharding.models.native import NativeSession
from sharding.models.signature import ModelSpec
from tests import models
from tests.browser.conftest import ENGINES, launched

# WASM is the reference build; native onnxruntime has other kernels for the same float32 sums.
WASM_ATOL = {"minilm": 1e-4, "ocr": 1e-4, "vad": 1e-5}
# Software WebGPU sums in another order again, and rounds exp and rsqrt otherwise.
WEBGPU_ATOL = {"minilm": 5e-3}


def spec_of(name: str) -> ModelSpec:
    paths = {"minilm": minilm_folder, "ocr": ocr_detector_path, "vad": silero_vad_path}
    return read_model(name, paths[name]()).spec


def inputs_of(name: str) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(7)
    if name == "minilm":
        shape = (2, 12)
        return {
            "input_ids": rng.integers(1000, 20000, shape, dtype=np.int64),
            "attention_mask": np.ones(shape, np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
        }
    if name == "ocr":
        return {"x": rng.standard_normal((1, 3, 64, 96), dtype=np.float32)}
    return {
        "input": rng.standard_normal((1, 512), dtype=np.float32) * np.float32(0.1),
        "state": np.zeros((2, 1, 128), np.float32),
        "sr": np.array(16000, np.int64),
    }


async def ask(
    host: BrowserHost, ref: HostRef, op_id: str, model: str, inputs: dict[str, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    reply = await host.run(RunRequest(op_id, ref, model, 60.0), inputs)
    assert reply.failure is None, reply.failure
    assert reply.answered
    return dict(reply.outputs)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ENGINES)
async def test_text_vision_and_audio_models_equal_native_onnxruntime(kind: BrowserType) -> None:
    async with launched(kind) as (host, report):
        ref = HostRef(f"{kind}-0", 0)
        assert report.facts.isolated
        assert report.facts.wasm_simd
        for name in ("minilm", "ocr"):
            spec = spec_of(name)
            numeric = await host.load(ref, 1, spec, (Backend.WASM,))
            assert numeric.backend is Backend.WASM
            native = NativeSession(spec.files[0].path)
            native.open()
            expected = native.run(inputs_of(name))
            answer = await ask(host, ref, f"op-{name}", name, inputs_of(name))
            for output, values in expected.items():
                assert answer[output].dtype == values.dtype
                np.testing.assert_allclose(answer[output], values, atol=WASM_ATOL[name], rtol=1e-3)
        await _speech_with_state(host, ref)


async def _speech_with_state(host: BrowserHost, ref: HostRef) -> None:
    """Silero's state goes out with each answer and comes back with the next question."""
    spec = spec_of("vad")
    await host.load(ref, 1, spec, (Backend.WASM,))
    native = NativeSession(spec.files[0].path)
    native.open()
    here, there = inputs_of("vad"), inputs_of("vad")
    for step in range(5):
        answer = await ask(host, ref, f"op-vad-{step}", "vad", here)
        expected = native.run(there)
        for name in ("output", "stateN"):
            np.testing.assert_allclose(answer[name], expected[name], atol=WASM_ATOL["vad"])
        here["state"], there["state"] = answer["stateN"], expected["stateN"]


@pytest.mark.peer
@pytest.mark.parametrize("kind", [BrowserType.CHROME, BrowserType.FIREFOX])
async def test_webgpu_on_a_software_adapter_agrees_within_tolerance(kind: BrowserType) -> None:
    async with launched(kind, gpu=Gpu.SOFTWARE, warm_runs=1) as (host, report):
        if not report.facts.webgpu:
            pytest.skip(f"no WebGPU adapter here: {report.facts.webgpu_adapter}")
        ref = HostRef(f"{kind}-0", 0)
        spec = spec_of("minilm")
        numeric = await host.load(ref, 1, spec, (Backend.WEBGPU,))
        assert numeric.backend is Backend.WEBGPU
        assert numeric.adapter
        native = NativeSession(spec.files[0].path)
        native.open()
        expected = native.run(inputs_of("minilm"))["last_hidden_state"]
        answer = await ask(host, ref, "op", "minilm", inputs_of("minilm"))
        difference = np.abs(answer["last_hidden_state"] - expected).max()
        assert difference < WEBGPU_ATOL["minilm"]


async def test_auto_does_not_take_a_software_webgpu_adapter() -> None:
    async with launched(BrowserType.CHROME, gpu=Gpu.SOFTWARE, warm_runs=1) as (host, report):
        if not report.facts.webgpu_software:
            pytest.skip("this machine has a real GPU")
        every = (Backend.WEBNN, Backend.WEBGPU, Backend.WASM)
        numeric = await host.load(HostRef("chrome-0", 0), 1, spec_of("minilm"), every)
        assert numeric.backend is Backend.WASM


async def test_an_operation_id_is_answered_once_and_then_from_memory() -> None:
    async with launched(BrowserType.CHROME) as (host, _):
        ref = HostRef("chrome-0", 0)
        await host.load(ref, 1, spec_of("vad"), (Backend.WASM,))
        request = RunRequest("same", ref, "vad", 30.0)
        first = await host.run(request, inputs_of("vad"))
        again = await host.run(request, inputs_of("vad"))
        assert not first.repeated
        assert again.repeated
        np.testing.assert_array_equal(first.outputs["output"], again.outputs["output"])
        assert host.status().served == 1


async def test_what_the_page_reports_is_a_failure_of_that_operation_only() -> None:
    async with launched(BrowserType.CHROME) as (host, _):
        ref = HostRef("chrome-0", 0)
        await host.load(ref, 1, spec_of("minilm"), (Backend.WASM,))
        out_of_range = inputs_of("minilm")
        out_of_range["input_ids"] = np.full((2, 12), 10**7, np.int64)
        reply = await host.run(RunRequest("bad", ref, "minilm", 30.0), out_of_range)
        assert reply.failure is not None
        assert reply.failure.category == "api_error"
        assert reply.failure.scope == "operation"
        assert (await ask(host, ref, "good", "minilm", inputs_of("minilm")))[
            "last_hidden_state"
        ].any()


async def test_an_operation_of_another_epoch_is_refused() -> None:
    async with launched(BrowserType.CHROME) as (host, _):
        await host.load(HostRef("chrome-0", 0), 1, spec_of("vad"), (Backend.WASM,))
        request = RunRequest("late", HostRef("chrome-0", 7), "vad", 30.0)
        reply = await host.run(request, inputs_of("vad"))
        assert reply.failure is not None
        assert reply.failure.evidence["what"] == "replaced"
        with pytest.raises(BrowserLost):
            await host.load(HostRef("chrome-0", 7), 1, spec_of("vad"), (Backend.WASM,))


X = np.ones(4, np.float32)


@pytest.mark.parametrize("kind", ENGINES)
async def test_external_data_is_found_however_the_graph_writes_its_name(
    kind: BrowserType, tmp_path: Path
) -> None:
    async with launched(kind, warm_runs=1) as (host, _):
        ref = HostRef(f"{kind}-0", 0)
        written = ("sub//w.bin", "./w.bin", ".//w.bin", "././w.bin", "sub/../w.bin")
        for number, location in enumerate(written):
            path = tmp_path / str(number) / "m.onnx"
            models.external_model(path, locations=(location, "b.bin"))
            spec = read_model(f"m{number}", path).spec
            await host.load(ref, 1, spec, (Backend.WASM,))
            answer = await ask(host, ref, f"op-{number}", spec.name, {"x": X})
            assert answer["y"].tolist() == [3.0] * 4


@pytest.mark.parametrize("kind", ENGINES)
async def test_answer_that_no_message_carries_fails_at_once_and_harms_nothing(
    kind: BrowserType, tmp_path: Path
) -> None:
    async with launched(kind, warm_runs=1) as (host, _):
        ref = HostRef(f"{kind}-0", 0)
        most = read_model("most", models.chatty_model(tmp_path / "most.onnx", TENSORS_MAX)).spec
        await host.load(ref, 1, most, (Backend.WASM,))
        # A pool refuses these before any browser hears of them: here the page has to.
        for number, (outputs, name, why) in enumerate(
            (
                (TENSORS_MAX + 1, "y{}", "1025 outputs, and a message carries at most 1024"),
                (2, "y" * (HEADER_BYTES_MAX // 2) + "{}", "a message has at most"),
                (1, "__metadata__", "can't be called __metadata__"),
            )
        ):
            path = models.chatty_model(tmp_path / f"{number}.onnx", outputs, name)
            spec = read_model(f"m{number}", path).spec
            with pytest.raises(PageError, match=why) as caught:
                async with asyncio.timeout(60):  # of 120 that a load may take
                    await host.load(ref, 1, spec, (Backend.WASM,))
            assert caught.value.fields["what"] == "encode_failed"
        answer = await ask(host, ref, "op", "most", {"x": X[:1]})
        assert len(answer) == TENSORS_MAX
        assert await host.next_event(1, 0.1) is None, "the browser is well"


LARGE = {"x": np.zeros((1, 3, 960, 960), np.float32)}  # seconds of work for the OCR detector


async def test_a_page_that_is_at_one_operation_for_too_long_is_reported_as_hung() -> None:
    async with launched(BrowserType.CHROME, hang_seconds=0.5, warm_runs=1) as (host, _):
        ref = HostRef("chrome-0", 0)
        await host.load(ref, 1, spec_of("ocr"), (Backend.WASM,))
        huge = {"x": np.zeros((1, 3, 1920, 1920), np.float32)}
        reply = await host.run(RunRequest("slow", ref, "ocr", 30.0), huge)
        assert reply.failure is not None
        assert reply.failure.category == "timeout"
        assert reply.failure.scope == "page"
        event = await host.next_event(1, 1.0)
        assert event is not None
        assert event.failure is not None
        assert event.failure.evidence["what"] == "page_hung"


async def test_a_busy_page_is_not_taken_for_a_hung_one() -> None:
    async with launched(BrowserType.CHROME, warm_runs=1) as (host, _):
        ref = HostRef("chrome-0", 0)
        await host.load(ref, 1, spec_of("ocr"), (Backend.WASM,))
        reply = await host.run(RunRequest("impatient", ref, "ocr", 0.1), LARGE)
        assert reply.failure is not None
        assert reply.failure.scope == "operation"
        assert host.status().queue == 1, "the page is still at it, and that counts"
        small = await ask(host, ref, "patient", "ocr", inputs_of("ocr"))
        assert small
        assert await host.next_event(1, 0.1) is None


async def test_a_model_that_changed_on_disk_is_not_loaded(tmp_path: Path) -> None:
    copy = tmp_path / "vad.onnx"
    shutil.copy(silero_vad_path(), copy)
    spec = read_model("vad", copy).spec
    copy.write_bytes(copy.read_bytes() + b"x")
    async with launched(BrowserType.CHROME) as (host, _):
        with pytest.raises(PageError, match="has changed"):
            await host.load(HostRef("chrome-0", 0), 1, spec, (Backend.WASM,))


async def test_a_driver_that_ends_at_once_is_a_launch_failure_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "chromedriver"
    driver.write_text("#!/bin/sh\nexit 1\n")
    driver.chmod(0o755)
    monkeypatch.setenv("TABPOOL_CHROMEDRIVER", str(driver))
    began = time.monotonic()
    with pytest.raises(LaunchFailed, match="driver ended with 1"):
        async with launched(BrowserType.CHROME):
            pass
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("kind", ENGINES)
async def test_browser_shares_neither_network_nor_environment_of_its_worker(
    kind: BrowserType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that is not there, a home that can't be written, a secret, and strangers."""
    monkeypatch.setenv("TABPOOL_CACHE", str(cache_root()))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, "/proc/nowhere")
    monkeypatch.setenv("A_TOKEN", "not for browsers")
    async with launched(kind) as (host, report):
        ref = HostRef(f"{kind}-0", 0)
        await host.load(ref, 1, spec_of("vad"), (Backend.WASM,))
        assert await ask(host, ref, "op", "vad", inputs_of("vad"))
        environments, networks = {}, {}
        for process in host.process.tree().tree():
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):  # it has ended
                environments[process.pid] = process.environ()
                networks[process.pid] = os.readlink(f"/proc/{process.pid}/ns/net")
        assert {report.pids["driver"], report.pids["browser"]} <= networks.keys()
        for environment in environments.values():
            values = set(environment.values())
            assert not values & {"not for browsers", "http://127.0.0.1:9", "/proc/nowhere"}
        if not report.facts.private_network:
            pytest.skip(f"no private network here: {report.facts.network_note}")
        # Sandboxed processes of an engine may have networks of their own, without even loopback.
        assert os.readlink("/proc/self/ns/net") not in networks.values()
        assert report.port == 0
        driver = ("127.0.0.1", int(report.driver_url.rpartition(":")[2]))
        with socket.socket() as stranger:
            assert stranger.connect_ex(driver) == errno.ECONNREFUSED
