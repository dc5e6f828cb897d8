"""Failure bundles made by an enemy: nothing is contacted, written, or unpacked beyond its bounds.

What a bundle of ours must not tell is tested here, too.
"""

from __future__ import annotations

import copy
import io
import json
import os
import re
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from actors.messages import PageDiagnostics
from pool.bundles import (
    REPLAYED_OPTIONS,
    Bundle,
    collect,
    described,
    model_as_plain,
    pool_as_plain,
    read_bundle,
    read_inputs,
    write_bundle,
)
from pool.chaos import replayed
from pool.commands import chaos as chaos_command
from pool.commands import replay as replay_command
from pool.commands.main import app
from pool.config import PoolConfig
from pool.models.loading import read_parts
from pool.models.registry import read_components, read_model
from pool.replaying import made_up, order_from, verified_path
from pool.results import RecoveryStep, Result
from recovery.errors import BadInput, PoolError
from recovery.failures import categorize_browser_failure
from recovery.faults import SCHEDULE_FAULTS_MAX, Due, Fault, FaultKind, Schedule
from recovery.kinds import BrowserType, Level, Readiness
from recovery.records import HostRef, HostStatus
from sharding.cutting.manager import ModelShardingManager
from tests import enemies
from tests.logs import write as write_log
from tests.models import add_model, identity_model
from tests.unit.test_pipeline import DECODERS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "models").mkdir()
    return identity_model(tmp_path / "models" / "m.onnx")


@pytest.fixture
def facts(model) -> dict:
    """What an honest bundle says."""
    return {
        "format": 1,
        "why": "failed",
        "operation": {
            "op_id": "1",
            "model": "m",
            "op": "inference",
            "inputs": {"x": described(np.ones((2, 3), np.float32))},
        },
        "result": {"error": "it died", "original_error": "crash: it died"},
        "model": model_as_plain(read_model("m", model)),
        "pool": pool_as_plain(PoolConfig()),
        "chaos": None,
    }


class Stopped(Exception):
    """A pool was made, and here the test ends."""


@pytest.fixture
def pools(monkeypatch) -> list[dict]:
    """The options of every pool that a replay would have made; none is."""
    made: list[dict] = []

    def pool(**options):
        PoolConfig(**options).checked()
        made.append(options)
        return NoPool(made)

    monkeypatch.setattr(replay_command, "BrowserPool", pool)
    return made


class NoPool:
    def __init__(self, made: list[dict]) -> None:
        self._made = made

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None

    async def load(self, name, path, *, shards, strategy):
        self._made[-1]["loaded"] = (name, str(path), shards, strategy)
        raise Stopped("the test ends here")


def replayed_with(facts, tmp_path, *arguments, files=None, inputs=None, answer=None):
    path = write_bundle(Bundle(facts, inputs, files or {}), tmp_path / "b.zip")
    return CliRunner().invoke(app, ["replay", str(path), *map(str, arguments)], input=answer)


def refused_with(data: bytes, tmp_path, *arguments):
    """The refusal of a replay of an archive with this content, described or run."""
    path = tmp_path / "b.zip"
    path.write_bytes(data)
    told = set()
    for more in ([], ["--show"]):
        done = CliRunner().invoke(app, ["replay", str(path), *arguments, *more])
        assert isinstance(done.exception, BadInput), (more, done.output, done.exception)
        told.add(str(done.exception))
    (words,) = told
    assert str(path) in words
    return words


# -- the pool's options ----------------------------------------------------------------------------


def test_an_honest_bundle_is_replayed(facts, tmp_path, pools, model):
    done = replayed_with(facts, tmp_path, answer="y\n")
    assert isinstance(done.exception, Stopped)
    (options,) = pools
    assert options.pop("loaded") == ("m", str(model), None, None)
    expected = {name: getattr(PoolConfig(), name) for name in REPLAYED_OPTIONS}
    assert options == expected | {"browsers": {"chrome": 1}, "history": False, "dashboard": False}
    assert "Not used" not in done.output


HARMFUL = {
    "address": "ray://evil.example:10001",
    "state_dir": "/tmp/evil",
    "name": "evil",
    "persistent": True,
    "dashboard": True,
    "history": True,
    "faults": True,
    "breaker": {"failure_threshold": 1},
    "history_limits": {},
    "max_connections": 10_000,
    "adaptive_scaling": {"chrome": [1, 1000]},
    "_owner": False,
    "no such option": 1,
}


def test_only_harmless_options_are_taken(facts, tmp_path, pools, model):
    facts["pool"] |= HARMFUL
    done = replayed_with(facts, tmp_path, "--model", model)
    assert isinstance(done.exception, Stopped)
    (options,) = pools
    assert options.keys() == {*REPLAYED_OPTIONS, "browsers", "history", "dashboard", "loaded"}
    assert options["history"] is options["dashboard"] is False
    output = " ".join(done.output.split())
    for name in HARMFUL:
        assert name in output.partition("Not used of the bundle's pool:")[2]


def test_every_option_of_a_pool_is_harmless_or_left_out():
    """A new option is left out, until somebody has thought of it."""
    harmful = {"address", "state_dir", "name", "persistent", "dashboard", "history", "faults"}
    assert not harmful & REPLAYED_OPTIONS.keys()
    for name, types in REPLAYED_OPTIONS.items():
        assert isinstance(getattr(PoolConfig(), name), types)


@pytest.mark.parametrize(
    "changes",
    [
        {"browsers": {"chrome": 33}},
        {"browsers": {"chrome": 1 << 70}},
        {"browsers": {"lynx": 1}},
        {"browsers": {"chrome": -1}},
        {"browsers": "chrome"},
        {"browsers": None},
        {"level": "godlike"},
        {"level": ["none"]},
        {"strategy": ["a"]},
        {"strict": "no"},
        {"headless": 0},
        {"threads": True},
        {"threads": 1 << 40},
        {"deadline": 1e300},
        {"deadline": "5"},
        {"message_bytes_max": 1 << 62},
        {"hedge_quantile": 7.0},
        {"backend": "cuda"},
    ],
    ids=str,
)
def test_an_option_that_makes_no_sense_is_refused(changes, facts, tmp_path, pools, model):
    facts["pool"] |= changes
    done = replayed_with(facts, tmp_path, "--model", model)
    assert isinstance(done.exception, PoolError)
    assert not isinstance(done.exception, Stopped)
    assert pools == []


# -- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [None, "", "n\n", "\n", "\x00\n"])
def test_no_model_is_loaded_unasked(answer, facts, tmp_path, pools, model):
    model.unlink()
    os.mkfifo(model)  # whoever looks into it waits
    done = replayed_with(facts, tmp_path, answer=answer)
    assert isinstance(done.exception, BadInput)
    assert "--model" in str(done.exception)
    assert str(model) in done.output
    assert facts["model"]["digest"][:16] in done.output
    assert pools == []


def test_a_path_is_shown_so_that_it_can_be_judged(facts, tmp_path, pools):
    facts["model"]["path"] = "/srv/\x1b[1A\x1b[2K/home/me/good.onnx\u202e"
    done = replayed_with(facts, tmp_path, answer="n\n")
    assert r"/srv/\x1b[1A\x1b[2K/home/me/good.onnx\u202e" in done.output
    assert "\x1b" not in done.output


def changed(model: Path) -> None:
    model.write_bytes(model.read_bytes() + b"x")


def same_size(model: Path) -> None:
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(bytes(data))


def gone(model: Path) -> None:
    model.unlink()


def pipe(model: Path) -> None:
    model.unlink()
    os.mkfifo(model)


def device(model: Path) -> None:
    model.unlink()
    model.symlink_to("/dev/zero")


@pytest.mark.parametrize("how", [changed, same_size, gone, pipe, device], ids=lambda f: f.__name__)
def test_what_lies_there_now_is_loaded_only_if_it_is_the_same(how, facts, tmp_path, pools, model):
    how(model)
    done = replayed_with(facts, tmp_path, answer="y\n")
    assert isinstance(done.exception, BadInput)
    assert str(model) in str(done.exception)
    assert pools == []


def test_the_file_that_is_loaded_is_one_of_those_that_are_checked(facts, tmp_path, pools, model):
    add_model(model.with_name("evil.onnx"))
    facts["model"]["path"] = str(model.with_name("evil.onnx"))
    done = replayed_with(facts, tmp_path, answer="y\n")
    assert isinstance(done.exception, BadInput)
    assert "evil.onnx" in str(done.exception)
    assert pools == []


def test_a_file_of_another_user_is_not_loaded_by_the_bundle(facts, model, monkeypatch):
    if os.geteuid() == 0:
        os.chown(model, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(BadInput, match="belongs to another user"):
        verified_path(order_from(facts))


@pytest.mark.parametrize("files", [None, [], "missing"])
def test_a_bundle_that_does_not_say_what_was_there_needs_a_model(files, facts, tmp_path, pools):
    facts["model"]["files"] = files
    if files == "missing":
        del facts["model"]["files"]
    done = replayed_with(facts, tmp_path, answer="y\n")
    assert isinstance(done.exception, BadInput)
    assert pools == []


def test_a_model_in_parts_is_known_by_all_of_its_files(tmp_path):
    cut = tmp_path / "cut"
    ModelShardingManager(DECODERS / "builder-llama.onnx", cut).shard(2)
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("a", "b"):
        (parts / name).mkdir()
        add_model(parts / name / "model.onnx")
    entries = {
        "whole": read_model("m", DECODERS / "builder-llama.onnx"),
        "cut": read_parts("m", cut)[0],
        "components": read_components("m", parts),
    }
    for kind, entry in entries.items():
        plain = json.loads(json.dumps(model_as_plain(entry)))
        told = {
            "operation": {"model": "m", "op": "x", "inputs": {}},
            "model": plain,
            "pool": pool_as_plain(PoolConfig()),
        }
        path = verified_path(order_from(told))
        assert path.exists()
        if kind == "cut":
            assert {file["name"] for file in plain["files"]} == {p.name for p in cut.iterdir()}
        if kind == "components":
            assert path == parts
            assert {file["name"] for file in plain["files"]} == {"a/model.onnx", "b/model.onnx"}
            assert read_components("m", path).spec.digest == plain["digest"]
        last = Path(path if path.is_dir() else path.parent) / plain["files"][-1]["name"]
        if tmp_path in last.parents:
            changed(last)
            with pytest.raises(BadInput, match=re.escape(last.name)):
                verified_path(order_from(told))


@pytest.mark.parametrize(
    "changes",
    [
        {"path": 1},
        {"path": "x" * 5000},
        {"path": "a\0b"},
        {"digest": "0"},
        {"digest": "../../../etc"},
        {"digest": None},
        {"name": ""},
        {"name": {}},
        {"shards": 0},
        {"shards": True},
        {"shards": 1 << 40},
        {"shards": "2"},
        {"strategy": 1},
        {"files": {}},
        {"files": [1]},
        {"files": [{}]},
        {"files": [{"name": "../m", "bytes": 1, "digest": "0" * 64}]},
        {"files": [{"name": "/etc/passwd", "bytes": 1, "digest": "0" * 64}]},
        {"files": [{"name": "m", "bytes": -1, "digest": "0" * 64}]},
        {"files": [{"name": "m", "bytes": 1.0, "digest": "0" * 64}]},
        {"files": [{"name": "m", "bytes": 1, "digest": "z" * 64}]},
        {"files": [{"name": "m", "bytes": 1, "digest": "0" * 64}] * 2},
        {"files": [{"name": str(n), "bytes": 1, "digest": "0" * 64} for n in range(4097)]},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_model_that_makes_no_sense_is_refused(changes, facts, tmp_path, pools, model):
    facts["model"] |= changes
    for arguments in (["--model", model], []):
        done = replayed_with(facts, tmp_path, *arguments, answer="y\n")
        assert isinstance(done.exception, BadInput), done.exception
        assert pools == []


# -- the operation and its inputs ------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"op": None},
        {"op": "x" * 201},
        {"model": 1},
        {"model": ""},
        {"inputs": None},
        {"inputs": []},
        {"inputs": {"x": 1}},
        {"inputs": {str(n): {} for n in range(1025)}},
        {"inputs": {"x": {}}},
        {"inputs": {"x": {"kind": ["array"]}}},
        {"inputs": {"x": {"kind": "text", "characters": 10**12}}},
        {"inputs": {"x": {"kind": "text", "characters": -1}}},
        {"inputs": {"x": {"kind": "text", "characters": "9"}}},
        {"inputs": {"x": {"kind": "option", "value": "a text"}}},
        {"inputs": {"x": {"kind": "option", "value": [1]}}},
        {"inputs": {"x": {"kind": "array", "dtype": "object", "shape": [1]}}},
        {"inputs": {"x": {"kind": "array", "dtype": "O,O", "shape": [1]}}},
        {"inputs": {"x": {"kind": "array", "dtype": "M8[ns]", "shape": [1]}}},
        {"inputs": {"x": {"kind": "array", "dtype": ["f4"], "shape": [1]}}},
        {"inputs": {"x": {"kind": "array", "shape": [1]}}},
        {"inputs": {"x": {"kind": "array", "dtype": "float32"}}},
        {"inputs": {"x": {"kind": "array", "dtype": "float32", "shape": [1 << 34]}}},
        {"inputs": {"x": {"kind": "array", "dtype": "int8", "shape": [1 << 20, 1 << 20]}}},
        {"inputs": {"x": {"kind": "array", "dtype": "float32", "shape": [0, 1 << 39]}}},
        {"inputs": {"x": {"kind": "array", "dtype": "float32", "shape": [-1]}}},
        {"inputs": {"x": {"kind": "array", "dtype": "float32", "shape": [True]}}},
        {"inputs": {"x": {"kind": "array", "dtype": "float32", "shape": [1] * 65}}},
        {"inputs": {"x": {"kind": "array", "dtype": "float32", "shape": [10**4000]}}},
        {"inputs": {"x": {"kind": "array", "dtype": "str999999999", "shape": [1000]}}},
        {
            "inputs": {
                str(n): {"kind": "array", "dtype": "float64", "shape": [1 << 22]} for n in range(5)
            }
        },
    ],
    ids=lambda changes: str(changes)[:80],
)
def test_an_operation_that_makes_no_sense_is_refused(changes, facts, tmp_path, pools, model):
    facts["operation"] |= changes
    done = replayed_with(facts, tmp_path, "--model", model)
    assert isinstance(done.exception, BadInput)
    assert pools == []


def test_texts_are_made_up_as_texts():
    given = {
        "text": ["one", "and another"],
        "empty": np.zeros((1, 0, 4), np.float32),
        "flag": True,
        "none": None,
    }
    found = made_up({name: described(value) for name, value in given.items()})
    assert len(found["text"]) == 2
    assert all(isinstance(text, str) and text for text in found["text"])
    assert found["empty"].shape == (1, 0, 4)
    assert (found["flag"], found["none"]) == (True, None)


def test_texts_come_back_as_texts(facts, tmp_path):
    inputs = {"text": ["one", "another"], "option": np.float32(0.5), "on": False, "t": 0.7}
    found = read_bundle(write_bundle(Bundle(facts, inputs), tmp_path / "b.zip")).inputs
    assert found["text"] == ["one", "another"]
    assert found["on"] is False
    assert found["option"] == np.float32(0.5)


def test_inputs_given_by_hand_are_read_as_carefully(facts, tmp_path, pools, model):
    made = tmp_path / "made by the enemy"
    path = tmp_path / "inputs.npz"
    path.write_bytes(enemies.archive({"x.npy": enemies.pickled_array(str(made))}))
    done = replayed_with(facts, tmp_path, "--model", model, "--inputs", path)
    assert isinstance(done.exception, BadInput)
    assert "inputs.npz" in str(done.exception)
    with pytest.raises(BadInput, match="regular"):
        read_inputs("/dev/zero")
    assert not made.exists()
    assert pools == []


# -- chaos runs ------------------------------------------------------------------------------------


@pytest.fixture
def chaos(facts) -> dict:
    schedule = Schedule(1, (Due(1.0, Fault(FaultKind.TAB_CRASH, target="chrome-0")),))
    facts["chaos"] = {
        "schedule": json.loads(schedule.to_json()),
        "settings": {
            "level": "high", "strategy": "progressive", "browsers": "chrome=2",
            "model": "text,audio", "backend": "wasm", "operations": "100", "at_once": "4",
            "nodes": "1", "gated": "True", "settle": "True", "deadline": "120",
            "simulation": "off",
        },
        "number": 17,
    }  # fmt: skip
    return facts["chaos"]


@pytest.fixture
def runs(monkeypatch) -> list[dict]:
    made: list[dict] = []

    def run(console, schedule, settings, bundles=None):
        made.append(settings)
        raise Stopped("the test ends here")

    monkeypatch.setattr(chaos_command, "run_chaos", run)
    return made


def test_an_honest_chaos_run_is_replayed(chaos, facts, tmp_path, runs, pools):
    done = replayed_with(facts, tmp_path)
    assert isinstance(done.exception, Stopped), done.exception
    assert runs == [{**chaos["settings"], "operations": "18"}]
    assert pools == []


def test_a_chaos_run_is_shown_before_it_is_run(chaos, facts, tmp_path):
    chaos["settings"]["model"] = "\x1b[2J/evil.onnx"
    done = replayed_with(facts, tmp_path, "--show")
    assert done.exit_code == 0
    assert "up to operation 17" in done.output
    assert "chrome=2" in done.output
    assert "/evil.onnx" in done.output
    assert "\x1b" not in done.output


def test_settings_that_nobody_knows_are_not_taken(chaos, facts, tmp_path, runs):
    chaos["settings"] |= {"address": "ray://evil", "report": "/etc", "simulation": "on"}
    assert isinstance(replayed_with(facts, tmp_path).exception, Stopped)
    assert {"address", "report"}.isdisjoint(runs[0])
    assert runs[0]["simulation"] == "off"


def test_a_model_by_its_path_is_not_opened_by_the_bundle(chaos, facts, tmp_path, runs, model):
    os.mkfifo(tmp_path / "evil.onnx")
    chaos["settings"]["model"] = f"text,{tmp_path / 'evil.onnx'}"
    done = replayed_with(facts, tmp_path, answer="y\n")
    assert isinstance(done.exception, BadInput)
    assert "--model" in str(done.exception)
    assert runs == []
    done = replayed_with(facts, tmp_path, "--model", model)
    assert isinstance(done.exception, Stopped)
    assert runs[0]["model"] == f"text,{model}"
    chaos["settings"]["model"] = "/a,/b"
    done = replayed_with(facts, tmp_path, "--model", model)
    assert isinstance(done.exception, BadInput)


@pytest.mark.parametrize(
    "changes",
    [
        {"number": -1},
        {"number": 10**9},
        {"number": "1"},
        {"settings": None},
        {"settings": []},
        {"schedule": None},
        {"schedule": [1]},
        {"schedule": {"seed": 1, "faults": [{"when": 1}] * 1000}},
        {"schedule": {"seed": 1, "faults": [0] * (SCHEDULE_FAULTS_MAX + 1)}},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_run_that_makes_no_sense_is_refused(changes, chaos, facts, tmp_path, runs):
    chaos |= changes
    done = replayed_with(facts, tmp_path)
    assert isinstance(done.exception, BadInput)
    assert runs == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("nodes", value) for value in ("0", "9", "1000000000", "-1", "1e3", "٣", 2, None)),
        *(("at_once", value) for value in ("0", "1025", "")),
        *(("deadline", value) for value in ("nan", "inf", "-1", "0", "1e99", "soon")),
        *(("gated", value) for value in ("yes", True)),
        *(("browsers", value) for value in ("chrome=33", "lynx=1", "chrome=" + "9" * 99, "", 1)),
        *(("level", value) for value in ("godlike", {})),
        *(("backend", value) for value in ("cuda",)),
        *(("strategy", value) for value in ("none such",)),
        *(("model", value) for value in ("", 1, "x" * 501)),
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_refused(name, value, chaos, facts, tmp_path, runs):
    chaos["settings"][name] = value
    done = replayed_with(facts, tmp_path)
    assert isinstance(done.exception, BadInput), done.exception
    assert runs == []


def test_a_missing_setting_is_named(chaos):
    for name in ("level", "browsers", "model", "nodes", "deadline", "settle"):
        part = copy.deepcopy(chaos)
        del part["settings"][name]
        with pytest.raises(BadInput, match=name):
            replayed.run_of(part)


# -- what is shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        {"why": "\x1b]0;owned\x07"},
        {"why": {"a": [1] * 100_000}},
        {"operation": {}},
        {"operation": {"op": "[/red]", "model": "\r\nfake: line"}},
        {"result": {"error": "\x9b2J" + "x" * 100_000, "original_error": ["\u202e"]}},
        {"model": {"path": 1, "digest": {"a": 1}}},
        {"model": {}},
        {"pool": {}},
        {"pool": {"browsers": {"\x1b[2J": 1}, "level": "[blink]"}},
    ],
    ids=lambda part: str(part)[:40],
)
def test_any_bundle_is_described_without_harm(part, facts, tmp_path):
    facts |= part
    done = replayed_with(facts, tmp_path, "--show", files={"a.json": b"{}"})
    assert done.exit_code == 0, done.exception
    lines = done.output.splitlines()
    assert len(lines) == 6, "a text of the bundle makes no line of its own"
    assert all(line.isprintable() for line in lines)
    assert len(done.output) < 20_000


def test_to_describe_a_bundle_nothing_else_of_it_is_unpacked(facts, tmp_path, monkeypatch):
    path = write_bundle(Bundle(facts, {"x": np.ones(3)}, {"a": b"1"}), tmp_path / "b.zip")
    read: list[str] = []
    opened = zipfile.ZipFile.open

    def opening(self, name, *args, **kwargs):
        read.append(getattr(name, "filename", name))
        return opened(self, name, *args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, "open", opening)
    done = CliRunner().invoke(app, ["replay", str(path), "--show"])
    assert done.exit_code == 0
    assert "a, inputs.npz" in done.output
    assert read == ["bundle.json"]


# -- bombs -----------------------------------------------------------------------------------------


def bombs(folder: Path, facts: dict) -> dict[str, tuple[Path, str]]:
    """Bundles that would fill the memory, and the bound that each is refused by."""
    honest = json.dumps(facts).encode()
    few = enemies.archive({"bundle.json": honest})
    made = {
        "facts large": ({"bundle.json": b" " * (33 << 20) + honest}, "33,554,432 bytes"),
        "facts deep": ({"bundle.json": b"[" * 1_000_000}, "32 levels"),
        "facts wide": ({"bundle.json": b"[" + b"[]," * 5_000_000 + b"1]"}, "1,000,000 values"),
        "facts twice": ({"bundle.json": honest[:-1] + b', "pool": {}}'}, "'pool' twice"),
        "facts missing": ({"other.json": honest}, "bundle.json in it"),
        "facts no JSON": ({"bundle.json": b"\xff" * 100}, "as JSON in UTF-8"),
        "facts a list": ({"bundle.json": b"[1]"}, "a JSON object"),
        "file of 4 GiB": (enemies.forged(few, size=0xFFFFFFF0), "536,870,912 bytes"),
        "many": ({"bundle.json": honest, **{str(n): b"" for n in range(256)}}, "256 members"),
        "zip64": (enemies.with_zip64(few), "zip64"),
        "directory": (enemies.with_directory(few, 1, 0xFFFFFFFF), "256 members"),
        "bz2": (enemies.archive({"bundle.json": honest}, zipfile.ZIP_BZIP2), "stored or deflated"),
        "lzma": (enemies.archive({"bundle.json": honest}, zipfile.ZIP_LZMA), "stored or deflated"),
        "out of the folder": ({"bundle.json": honest, "../../x": b""}, "lead nowhere else"),
        "absolute": ({"bundle.json": honest, "/etc/x": b""}, "lead nowhere else"),
        "lies": (enemies.forged(few, size=100), "CRC|cut short"),
    }  # fmt: skip
    found = {}
    for name, (content, words) in made.items():
        path = folder / f"{name}.zip"
        path.write_bytes(content if isinstance(content, bytes) else enemies.archive(content))
        found[name] = (path, words)
    with (folder / "sparse.zip").open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(folder / "pipe.zip")
    (folder / "device.zip").symlink_to("/dev/zero")
    return found | {
        "sparse": (folder / "sparse.zip", "536,870,912 bytes"),
        "pipe": (folder / "pipe.zip", "not a regular file"),
        "device": (folder / "device.zip", "not a regular file"),
        "folder": (folder, "a folder"),
        "missing": (folder / "missing.zip", "No such file"),
    }


def packed_bombs(folder: Path, facts: dict, touched: Path) -> dict[str, tuple[Path, str]]:
    """Bundles with inputs that would fill the memory or run code; their facts are honest."""
    zeros = enemies.npy_of("|u1", f"({600 << 20},)")
    inner = {
        "pickle": ({"x.npy": enemies.pickled_array(str(touched))}, "numbers, booleans or text"),
        "shape": ({"x.npy": enemies.npy_of("<f4", "(1099511627776,)", b"1234")}, "as large as"),
        "empty shape": ({"x.npy": enemies.npy_of("<f4", "(0, 99999999999999)")}, "as large as"),
        "text": ({"x.npy": enemies.npy_of("<U499999999", "()", b"1234")}, "as large as|dtypes"),
        "header": ({"x.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\xff"}, "10,000 bytes"),
        "code": ({"x.npy": enemies.npy("{'descr': exit(1)}")}, "numbers, booleans or text"),
        "many": ({f"{n}.npy": b"" for n in range(1025)}, "1,024 members"),
        "no arrays": ({"x": b""}, "lead nowhere else"),
        "member": (enemies.forged(enemies.archive({"x.npy": zeros}), size=0xFFFFFFF0), "536,870"),
        "no archive": (b"PK nothing", "no zip archive"),
    }  # fmt: skip
    found = {}
    for name, (content, words) in inner.items():
        packed = content if isinstance(content, bytes) else enemies.archive(content)
        path = folder / f"packed {name}.zip"
        path.write_bytes(
            enemies.archive({"bundle.json": json.dumps(facts).encode(), "inputs.npz": packed})
        )
        found[f"packed {name}"] = (path, words)
    return found


# Runs `tabpool replay` on each bundle, where no more than so much memory can be had, and tells what
# Python's audit hooks saw of it: files opened for writing, sockets, processes, code unpickled.
CHILD = """
import json, resource, sys
from typer.testing import CliRunner
from pool.bundles import read_bundle
from pool.commands.main import app

CliRunner().invoke(app, ["replay", "missing.zip"])  # whatever is imported late
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize"))
limit = (used << 10) + (MEMORY << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

seen = []
WATCHED = ("socket.", "subprocess.", "os.", "shutil.", "pickle.", "ctypes.", "tempfile.")
HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")

def hook(event, arguments):
    if event == "open":
        writes = arguments[2] & 3 if isinstance(arguments[2], int) else 0
        if writes or (isinstance(arguments[1], str) and set("wax+") & set(arguments[1])):
            seen.append(f"open {arguments[0]}")
    elif event.startswith(WATCHED) and event not in HARMLESS:
        seen.append(f"{event} {arguments}")

sys.addaudithook(hook)
told = {}
for name, path, *more in json.load(sys.stdin):
    seen.clear()
    done = CliRunner().invoke(app, ["replay", path, *more], input="y\\n")
    error = done.exception
    told[name] = [type(error).__name__, str(error), list(seen), done.output[-2000:]]
print(json.dumps(told))
"""
CHILD_MEMORY_MIB = 256


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited as Linux has it")
def test_no_bundle_of_an_enemy_fills_the_memory_or_touches_anything(facts, tmp_path, model):
    touched = tmp_path / "made by the enemy"
    folder = tmp_path / "bombs"
    folder.mkdir()
    plain = bombs(folder, facts)
    packed = packed_bombs(folder, facts, touched)
    hostile = {**facts, "pool": {**facts["pool"], **HARMFUL}}
    missing = {**hostile, "model": {**facts["model"], "path": str(tmp_path / "none" / "m.onnx")}}
    (folder / "hostile.zip").write_bytes(
        enemies.archive({"bundle.json": json.dumps(missing).encode()})
    )
    orders = [
        *((name, str(path)) for name, (path, _) in plain.items()),
        *((f"{name}, shown", str(path), "--show") for name, (path, _) in plain.items()),
        *((name, str(path), "--model", str(model)) for name, (path, _) in packed.items()),
        ("hostile", str(folder / "hostile.zip")),
    ]
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    child = subprocess.run(
        [sys.executable, "-c", CHILD.replace("MEMORY", str(CHILD_MEMORY_MIB))],
        input=json.dumps(orders), capture_output=True, text=True, cwd=ROOT, timeout=240,
        check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    told = json.loads(child.stdout.splitlines()[-1])
    for name, *_ in orders:
        kind, words, seen, output = told[name]
        assert kind == "BadInput", (name, words, output)
        assert seen == [], name
        expected = (plain | packed).get(name.removesuffix(", shown"), (None, "none/m.onnx"))[1]
        assert re.search(expected, words), (name, words)
    assert not touched.exists()
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("part", ["operation", "result", "model", "pool"])
@pytest.mark.parametrize("value", [None, [], "a", 1])
def test_a_bundle_without_a_part_is_refused(part, value, facts, tmp_path):
    data = enemies.archive({"bundle.json": json.dumps({**facts, part: value}).encode()})
    assert f"its {part} is no JSON object" in refused_with(data, tmp_path)


# -- what ours must not tell -----------------------------------------------------------------------

TOKEN = "Zx9-kQ_3vT7bLmNp2RsUwYa4CdEfGh5JkMnPqRsTuVw"
assert len(TOKEN) == 43


class ToldPool:
    """A pool whose every text holds a secret."""

    def __init__(self, log_folder: Path) -> None:
        self.log_folder = log_folder

    async def export_telemetry(self):
        return {"pool": "p", "log_trouble": f"no: token={TOKEN}", "rate": float("nan")}

    def hosts(self):
        ref = HostRef("chrome-0", 1)
        return (HostStatus(ref, BrowserType.CHROME, Readiness.READY),)

    async def diagnose(self, browser_id, *, screenshot=True):
        return PageDiagnostics(
            HostRef(browser_id, 1),
            Readiness.READY,
            console=(f"can't open http://127.0.0.1:9/enter/{TOKEN}", "it uses hunter2-hunter2"),
            screenshot=b"\x89PNG",
        )


async def test_a_bundle_of_ours_tells_no_secret(tmp_path, monkeypatch, model):
    monkeypatch.setenv("SOME_SECRET", "hunter2-hunter2")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the token of Ray")
    write_log(tmp_path / "log", 7)
    failure = categorize_browser_failure(f"Bearer {TOKEN}", {"what": "browser_exited"})
    step = RecoveryStep("failed", "chrome-0", 0.1, 0.2, "hunter2-hunter2", failure)
    result = Result(
        "a", "m", "inference", False, Level.HIGH, recovery=(step,), original_error=failure,
        error="Ray refused the token of Ray: http://me:word@proxy:1/", metrics={"ms": float("inf")},
    )  # fmt: skip
    config = PoolConfig(
        name="secret-name", address="ray://head.example:10001", state_dir="/home/me/state",
        persistent=True,
    )  # fmt: skip
    entry = read_model("m", model)
    found = await collect(
        ToldPool(tmp_path / "log"),
        result,
        {"x": np.ones(3, np.float32)},
        entry=entry,
        config=config,
    )
    path = write_bundle(found, tmp_path / "b.zip")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {p.name for p in tmp_path.glob(".b.zip*")} == set()
    with zipfile.ZipFile(path) as archive:
        content = b"\n".join(archive.read(name) for name in archive.namelist()).decode("latin-1")
    for secret in (
        *(TOKEN, "hunter2", "the token of Ray", "me:word", "head.example", "secret-name"),
        *("/home/me/state", sys.executable),
    ):
        assert secret not in content, secret
    again = read_bundle(path)  # so it is within the bounds, too
    assert again.facts["model"]["digest"] == entry.spec.digest
    assert {"events.jsonl", "telemetry.json", "browsers/chrome-0.json"} < set(again.files)
    assert again.facts["result"]["error"] == "Ray refused ***: http://***@proxy:1/"


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": [{}, None]},
        {"../x": np.ones(1)},
        {"x": np.array(["2020-01-01"], "M8[D]")},
        {"x": np.broadcast_to(np.uint8(0), (600 << 20,))},  # within the bounds when packed
        {str(n): 1 for n in range(1025)},
    ],
    ids=["objects", "a name", "a time", "large", "many"],
)
def test_inputs_that_could_not_be_read_again_are_left_out(inputs, facts, tmp_path):
    path = write_bundle(Bundle(facts, inputs), tmp_path / "b.zip")
    again = read_bundle(path)
    assert (again.inputs, again.listed) == (None, ())


def test_the_largest_schedule_fits_into_a_bundle(facts, chaos, tmp_path):
    due = Due(10.0, Fault(FaultKind.MESSAGE_OVER_LIMIT, target="chrome-10"))
    schedule = Schedule(1, (due,) * SCHEDULE_FAULTS_MAX)
    chaos["schedule"] = json.loads(schedule.to_json())
    again = read_bundle(write_bundle(Bundle(facts), tmp_path / "b.zip"))
    assert replayed.run_of(again.facts["chaos"])[0] == schedule


def test_an_archive_in_memory_is_what_numpy_reads(tmp_path, facts):
    inputs = {"x": np.arange(6.0).reshape(2, 3), "file": np.ones(2), "allow_pickle": np.ones(1)}
    path = write_bundle(Bundle(facts, inputs), tmp_path / "b.zip")
    with zipfile.ZipFile(path) as archive, np.load(io.BytesIO(archive.read("inputs.npz"))) as found:
        for name, array in inputs.items():
            np.testing.assert_array_equal(found[name], array)
