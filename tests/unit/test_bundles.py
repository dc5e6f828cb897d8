"""A bundle holds what was known, and of what users sent only what was asked for."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

from pool.bundles import (
    Bundle,
    described,
    model_as_plain,
    pool_as_plain,
    read_bundle,
    result_as_plain,
    write_bundle,
)
from pool.chaos.workload import PAGE
from pool.config import PoolConfig
from pool.models.loading import read_parts
from pool.models.registry import read_model
from pool.replaying import made_up
from pool.results import RecoveryStep, Result
from recovery.errors import BadInput
from recovery.failures import categorize_browser_failure
from recovery.kinds import Level
from tests.models import identity_model
from tests.unit.test_pipeline import DECODERS

SECRET = "what nobody else may read"


def facts(**more):
    inputs = {"text": described(SECRET), "x": described(np.ones((2, 3), np.float32))}
    parts = {"operation": {"inputs": inputs}, "result": {}, "model": {}, "pool": {}}
    return {"format": 1, **parts, **more}


def test_a_bundle_comes_back_as_it_was_written(tmp_path):
    inputs = {"text": SECRET, "x": np.arange(6, dtype=np.float32).reshape(2, 3), "n": True}
    bundle = Bundle(facts(), inputs, {"events.jsonl": b"{}\n"})
    path = write_bundle(bundle, tmp_path / "b" / "1.zip")
    again = read_bundle(path)
    assert again.facts == json.loads(json.dumps(facts()))
    assert again.files == {"events.jsonl": b"{}\n"}
    assert again.inputs is not None
    assert again.inputs["text"] == SECRET
    assert again.inputs["n"] is True
    np.testing.assert_array_equal(again.inputs["x"], inputs["x"])
    assert [path.name for path in path.parent.iterdir()] == ["1.zip"]


def test_without_data_nothing_that_was_sent_is_in_it(tmp_path):
    path = write_bundle(Bundle(facts()), tmp_path / "1.zip")
    with zipfile.ZipFile(path) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert SECRET.encode() not in content
    assert read_bundle(path).inputs is None


def test_made_up_inputs_have_the_same_names_dtypes_and_shapes():
    asked = {
        "text": described(SECRET),
        "x": described(np.ones((2, 3), np.float32)),
        "ids": described([[1, 2, 3]]),
        "temperature": described(0.5),
    }
    found = made_up(asked)
    assert isinstance(found["text"], str)
    assert (found["x"].dtype, found["x"].shape) == (np.float32, (2, 3))
    assert (found["ids"].dtype.kind, found["ids"].shape) == ("i", (1, 3))
    assert found["temperature"] == 0.5


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 half"])
def test_what_is_no_bundle_is_refused(content, tmp_path):
    (tmp_path / "b.zip").write_bytes(content)
    with pytest.raises(BadInput, match="no failure bundle"):
        read_bundle(tmp_path / "b.zip")
    with pytest.raises(BadInput, match="no failure bundle"):
        read_bundle(tmp_path / "missing.zip")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("bundle.json", '{"format": 99}')
    with pytest.raises(BadInput, match="another version"):
        read_bundle(tmp_path / "c.zip")
    write_bundle(Bundle(facts(model="a model")), tmp_path / "d.zip")
    with pytest.raises(BadInput, match="its model is no JSON object"):
        read_bundle(tmp_path / "d.zip")


def test_a_model_is_named_so_that_it_can_be_loaded_again(tmp_path):
    entry = read_model("m", identity_model(tmp_path / "m.onnx"))
    plain = model_as_plain(entry)
    assert read_model("m", plain["path"]).spec.digest == plain["digest"]
    assert plain["shards"] is None

    path = DECODERS / "builder-llama.onnx"
    cut, _ = read_parts("llama", path, shards=2)
    plain = model_as_plain(cut)
    assert (plain["path"], plain["shards"]) == (str(path), 2)


def test_pool_and_result_are_plain():
    plain = pool_as_plain(PoolConfig(browsers={"chromium": 2, "firefox": 1}, level="high"))
    json.dumps(plain)
    assert plain["browsers"] == {"chrome": 2, "firefox": 1}
    assert plain["level"] == "high"
    assert PoolConfig(**plain).checked()
    failure = categorize_browser_failure("it died", {"what": "browser_exited"})
    step = RecoveryStep("failed", "chrome-0", 0.1, 0.2, "it died", failure)
    result = Result("a", "m", "inference", False, Level.HIGH, recovery=(step,), error="it died")
    plain = result_as_plain(result)
    json.dumps(plain)
    assert plain["recovery"][0]["failure"] == "crash: it died"


def test_the_page_that_workloads_read_is_there():
    image = np.load(PAGE)["image"]
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
