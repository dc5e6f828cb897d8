import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pool.commands import main as cli
from pool.commands import shard as shard_command
from pool.commands.shard import parse_size
from recovery.errors import BadInput, NotAModel
from sharding.cutting.manager import ModelShardingManager
from sharding.cutting.manifest import read_manifest
from sharding.models.load_memory import peak_bytes
from tests import models

LLAMA = Path(__file__).parents[1] / "assets" / "decoders" / "builder-llama.onnx"  # three layers


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


def shard(*arguments: object):
    return CliRunner().invoke(cli.app, ["shard", *map(str, arguments)])


def shown(*arguments: object) -> str:
    result = shard(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> Exception:
    result = shard(*arguments)
    assert result.exception is not None
    return result.exception


def test_the_table_shows_what_each_shard_is(out):
    text = shown(LLAMA, "--shards", 2, "--out", out)
    manifest = read_manifest(out)
    assert [shard.span for shard in manifest.shards] == [(0, 2), (2, 3)]
    row = next(line for line in text.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "0",
        "0 to 1",
        "104.6 KiB",
        "64.2 MiB",
        "input_ids, attention_mask",
        "2 x float32[batch_size, sequence_length, 32]",
    ]
    assert "logits" in text
    assert "layer_based, 2 shards as requested" in text
    assert f"written: {out}" in text
    assert f"found: {out}" in shown(LLAMA, "--shards", 2, "--out", out)


def test_json_has_the_same_for_programs(out):
    said = json.loads(shown(LLAMA, "--shards", 3, "--out", out, "--json"))
    manifest = read_manifest(out)
    assert said["folder"] == str(out)
    assert said["source"] == manifest.source
    assert (said["layers"], said["found"], said["total_seconds"]) == (3, False, None)
    for told, shard in zip(said["shards"], manifest.shards, strict=True):
        assert tuple(told["layers"]) == shard.span
        assert (out / told["file"]).is_file()
        assert told["bytes"] == shard.bytes
        assert told["load_peak_bytes"] == peak_bytes(shard.bytes)
        assert told["seconds"] is None
        assert [spec["name"] for spec in told["sends"]] == [spec.name for spec in shard.sends]
    assert said["shards"][0]["sends"] == said["shards"][1]["receives"]
    assert [spec["name"] for spec in said["shards"][2]["outputs"]] == ["logits"]


def test_capacity_makes_as_few_shards_as_fit(out):
    assert (
        json.loads(shown(LLAMA, "--capacity", "1GiB", "--out", out, "--json"))["shards"][1:] == []
    )
    # What loading takes beside twice the bytes is 64 MiB.
    said = json.loads(shown(LLAMA, "--capacity", "65700KiB", "--out", out, "--json"))
    assert [shard["layers"] for shard in said["shards"]] == [[0, 1], [1, 2], [2, 3]]


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ((), False),
        (("--measure",), True),
        (("--strategy", "optimal"), True),
        (("--strategy", "browser_based"), True),
        (("--strategy", "optimal", "--no-measure"), False),
    ],
)
def test_times_are_measured_where_they_decide_or_are_asked_for(out, options, measured):
    text = shown(LLAMA, "--shards", 2, "--out", out, *options)
    assert ("time per step" in text) == measured
    assert ("not measured" in text) == (not measured)
    said = json.loads(shown(LLAMA, "--shards", 2, "--out", out, *options, "--json"))
    assert [shard["seconds"] is not None for shard in said["shards"]] == [measured] * 2


def test_a_model_folder_is_taken_as_a_pool_takes_it(tmp_path):
    (tmp_path / "llama" / "onnx").mkdir(parents=True)
    shutil.copy(LLAMA, tmp_path / "llama" / "onnx" / "model.onnx")
    text = shown(tmp_path / "llama", "--shards", 2)
    folder = tmp_path / "llama" / "onnx" / "model.shards"
    assert f"written: {folder}" in text
    assert read_manifest(folder)
    assert shown(tmp_path / "llama", "--shards", 3)  # its own shards are not in its way


def test_components_are_shown_and_nothing_is_cut(tmp_path):
    models.add_model(tmp_path / "detector.onnx")
    models.pair_model(tmp_path / "recogniser.onnx")
    before = sorted(tmp_path.rglob("*"))
    text = shown(tmp_path, "--strategy", "component_based")
    assert "2 components, nothing to cut" in text
    assert "a: float32[batch, length]" in text
    said = json.loads(shown(tmp_path, "--strategy", "component_based", "--json"))
    assert list(said["components"]) == ["detector", "recogniser"]
    assert said["components"]["detector"]["path"] == str(tmp_path / "detector.onnx")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give --shards, or --capacity"),
        (("--strategy", "browser_based", "--capacity", "1GiB"), "give --shards"),
        (("--shards", 4), "pass shards=3 or less"),
        (("--capacity", "50MiB"), "takes 64 MiB while it loads"),
        (("--capacity", "much"), "expected a size such as 512MiB or 2GiB, got 'much'"),
        (("--strategy", "best"), "--strategy: expected one of layer_based, "),
    ],
)
def test_options_that_make_no_sense_are_refused(out, options, said):
    error = refused(LLAMA, "--out", out, *options)
    assert isinstance(error, BadInput)
    assert said in str(error)
    assert not out.exists()


@pytest.mark.parametrize(
    "option", [("--shards", 2), ("--capacity", "1GiB"), ("--out", "there"), ("--measure",)]
)
def test_options_for_cutting_are_refused_where_nothing_is_cut(tmp_path, option):
    error = refused(tmp_path, "--strategy", "component_based", *option)
    assert isinstance(error, BadInput)
    assert f"{option[0]} does not apply to --strategy component_based, which cuts nothing" in str(
        error
    )


def test_a_path_without_a_model_is_refused(tmp_path):
    assert isinstance(refused(tmp_path, "--shards", 2), NotAModel)
    assert isinstance(refused(tmp_path / "none.onnx", "--shards", 2), NotAModel)


def test_an_error_is_a_message_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tabpool", "shard", str(LLAMA)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "BadInput: The number of shards is missing" in capsys.readouterr().err


def test_help_has_an_example():
    text = shown("--help")
    assert "tabpool shard llama/model.onnx --capacity 2GiB" in text
    assert "component_based" in text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 << 20),
        ("2 gib", 2 << 30),
        ("1.5GB", 1_500_000_000),
        (" 3TiB ", 3 << 40),
        ("1KB", 1000),
        ("64B", 64),
        ("1000", 1000),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["MiB", "-1MiB", "1,5GiB", "5 apples", "1e9", "٣MiB", "0x10"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(BadInput, match="expected a size"):
        parse_size(text)


def test_the_bar_follows_what_is_written(monkeypatch, out):
    seen = []

    class Bar:
        def __enter__(self):
            return lambda done, total: seen.append((done, total))

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(shard_command, "_bar", lambda *_: Bar())
    monkeypatch.setattr(shard_command, "_POLL_SECONDS", 0.001)
    manager = ModelShardingManager(LLAMA, out)
    with shard_command._written(None, "writing", out, 1, 1000):
        written = manager.shard(1).shards[0].bytes
        while not seen or seen[-1][0] < written:
            time.sleep(0.001)
    assert seen[-1] == (written, 1000)
