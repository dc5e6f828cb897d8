"""Files that travel, made by an enemy: plans, reports, manifests, logs, histories, models' files.

Of failure bundles, see `test_enemy_bundles`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tracemalloc
from contextlib import closing
from pathlib import Path

import duckdb
import pytest
from rich.console import Console
from typer.testing import CliRunner

from actors.supervisor.orders import ORDER_BYTES_MAX, DiskOrders
from pool.chaos.records import read_run, run_from_json
from pool.commands.log_view import logged_line
from pool.commands.main import app
from pool.commands.printing import print_error
from pool.models.tokens import TOKENIZER_BYTES_MAX, TextEncoder
from pool.ocr.reading import read_dictionary
from recovery.errors import BadInput, NotAModel, PoolError
from recovery.faults import (
    SCHEDULE_FAULTS_MAX,
    Due,
    Fault,
    FaultKind,
    Schedule,
    read_schedule,
    schedule_from_json,
)
from recovery.history import store as history
from recovery.history.store import HistoryUnavailable
from recovery.log.log import CorruptLog, LogUnavailable, show, verify
from recovery.log.reading import read_lines, scan
from recovery.log.segments import LINE_BYTES_MAX, SEGMENT_BYTES_MAX, event_line, seal
from sharding.cutting.graph import load_proto, read_graph
from sharding.cutting.manifest import MANIFEST_NAME, read_manifest
from sharding.models.signature import digest_of, read_signature
from tests.histories import opened
from tests.logs import copied, events, state_of, write
from tests.models import identity_model

MEMORY = 48 << 20  # what may be taken by reading a file that is refused


@contextlib.contextmanager
def little_memory(bytes_max: int = MEMORY):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < bytes_max
    finally:
        tracemalloc.stop()


# -- plans and reports -----------------------------------------------------------------------------


def test_the_largest_schedule_comes_back():
    due = Due(10.0, Fault(FaultKind.TAB_CRASH, target="chrome-0"))
    schedule = Schedule(1, (due,) * SCHEDULE_FAULTS_MAX)
    assert schedule_from_json(schedule.to_json()) == schedule
    with pytest.raises(BadInput, match="limit is 100,000"):
        schedule_from_json(Schedule(1, (due,) * (SCHEDULE_FAULTS_MAX + 1)).to_json())


SCHEDULES = {
    "deep": (b"[" * 100_000, "at most 32 levels"),
    "wide": (b'{"seed": 1, "faults": [' + b"{}," * 1_500_000 + b"{}]}", "1,000,000 values"),
    "long": (b'{"seed": 1, "faults": [' + b"0," * 100_001 + b"0]}", "limit is 100,000"),
    "wrong everywhere": (b'{"seed": 1, "faults": [' + b"0," * 99_000 + b"0]}", r"faults\.0"),
    "twice": (b'{"seed": 1, "faults": [], "seed": 2}', "'seed' twice"),
    "never": (b'{"seed": 1, "faults": [{"when": NaN, "fault": {"kind": "timeout"}}]}', "NaN"),
    "escape": (b'{"seed": "\\u001b[2J", "faults": []}', "seed"),
    "list": (b"[]", "as a JSON object"),
}


@pytest.mark.parametrize(("text", "words"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_plan_of_an_enemy_is_refused(text, words, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(text)
    with little_memory(), pytest.raises(BadInput, match=words) as caught:
        read_schedule(path)
    assert "plan.json" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("read", [read_schedule, read_run, read_dictionary])
def test_no_reader_waits_for_a_pipe_or_reads_a_device(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(BadInput, match="can't be read"):
            read(path)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadInput, match="of at most"):
        read(tmp_path / "sparse")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{" + b'"a":[' * 50, "at most 32 levels"),
        (b'{"operations": [' + b"0," * 500_000 + b"0]}", r"run\.json"),
        (json.dumps({"settings": {str(n): 1 for n in range(2000)}}).encode(), "limit is 1,000"),
        (b'{"operations": [' + b"[]," * 4_000_000 + b"0]}", "4,000,000 values"),
    ],
    ids=["deep", "wrong everywhere", "settings", "wide"],
)
def test_a_report_of_an_enemy_is_refused(text, words, tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(text)
    with pytest.raises(BadInput, match=words):
        read_run(path)
    with pytest.raises(BadInput):
        run_from_json(text)


# -- manifests -------------------------------------------------------------------------------------


def spec(name="x", dtype="float32", shape=(1, "tokens")):
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def manifest(*, shards=1, **changes):
    """The manifest of a cut that no file belongs to, with changes to its first shard."""
    first = {
        "span": [0, 1],
        "files": [{"name": "shard-0.onnx", "bytes": 1, "digest": "0" * 64}],
        "receives": [],
        "sends": [],
        "shared": [spec()],
        "outputs": [spec("y")],
        "caches": [],
        **changes,
    }
    others = [
        {
            **first,
            "span": [n, n + 1],
            "files": [{"name": f"{n}.onnx", "bytes": 1, "digest": "0" * 64}],
        }
        for n in range(1, shards)
    ]
    told = {"name": "m", "source": "0" * 64, "kind": "decoder", "layers": shards}
    return {"format": 1, **told, "inputs": [spec()], "shards": [first, *others]}


def files(**changes):
    return [{"name": "shard-0.onnx", "bytes": 1, "digest": "0" * 64, **changes}]


MANIFESTS = {
    "deep": ("[" * 100_000, "at most 32 levels"),
    "wide": ("[" + "{}," * 1_000_000 + "{}]", "at most 1,000,000 values"),
    "large": (" " * (17 << 20), "at most 16,777,216 bytes"),
    "twice": (json.dumps(manifest())[:-1] + ', "layers": 1}', "'layers' twice"),
    "no shards": (json.dumps({**manifest(), "layers": 0, "shards": []}), "Cut the model again"),
    "many shards": (json.dumps(manifest(shards=4097)), "4,097 shards"),
    "a file again": (json.dumps(manifest(files=files() * 2)), "listed twice"),
    "a file elsewhere": (json.dumps(manifest(files=files(name="../a"))), "file name"),
    "a file with a code": (json.dumps(manifest(files=files(name="\x1b[2J"))), "file name"),
    "no digest": (json.dumps(manifest(files=files(digest="../../x"))), "SHA-256"),
    "absurd size": (json.dumps(manifest(files=files(bytes=1 << 60))), "a count"),
    "absurd layers": (json.dumps({**manifest(span=[0, 10**300]), "layers": 10**300}), "a count"),
    "absurd shape": (json.dumps(manifest(shared=[spec(shape=[1 << 40])])), "elements"),
    "absurd shape of two": (json.dumps(manifest(shared=[spec(shape=[1 << 20] * 2)])), "elements"),
    "negative shape": (json.dumps(manifest(outputs=[spec(shape=[-1])])), "a shape"),
    "many dimensions": (json.dumps(manifest(outputs=[spec(shape=[1] * 65)])), "a shape"),
    "a dtype of code": (json.dumps(manifest(shared=[spec(dtype="O,O")])), "a dtype"),
    "absurd window": (
        json.dumps(
            manifest(
                caches=[{"layer": 0, "past": spec(), "present": spec(), "window": 10**30}],
            )
        ),
        "a count",
    ),
}


def test_the_manifest_that_is_changed_here_is_none_that_is_refused(tmp_path):
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest(shards=3)))
    assert len(read_manifest(tmp_path, verify=False).shards) == 3


@pytest.mark.parametrize(("text", "words"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_of_an_enemy_is_refused(text, words, tmp_path):
    (tmp_path / MANIFEST_NAME).write_text(text)
    with little_memory(), pytest.raises(NotAModel, match=words) as caught:
        read_manifest(tmp_path, verify=False)
    assert MANIFEST_NAME in str(caught.value)


def test_a_shard_that_is_a_device_is_not_read_to_its_end(tmp_path):
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest()))
    (tmp_path / "shard-0.onnx").symlink_to("/dev/zero")
    with pytest.raises(NotAModel, match=r"shard-0\.onnx.*not a regular file"):
        read_manifest(tmp_path)


# -- models' files ---------------------------------------------------------------------------------


def test_a_graph_or_weights_that_are_pipes_or_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "zero.onnx").symlink_to("/dev/zero")
    for name in ("pipe.onnx", "zero.onnx"):
        for read in (lambda path: read_signature(path, name="m"), load_proto):
            with pytest.raises(NotAModel, match="not a regular file"):
                read(tmp_path / name)
        with pytest.raises(OSError, match="not a regular file"):
            digest_of(tmp_path / name)


def test_a_weight_of_a_million_dimensions_is_refused_at_once(tmp_path):
    import onnx

    path = tmp_path / "m.onnx"
    model = onnx.load(identity_model(path))
    model.graph.initializer.add(name="w", dims=[3] * 1_000_000, data_type=1)
    onnx.save(model, path)
    with pytest.raises(NotAModel, match="more than 64 dimensions"):
        read_graph(path)


@pytest.mark.parametrize("place", [{"offset": "-5"}, {"length": "-1"}, {"offset": "9" * 5000}])
def test_external_data_at_a_place_that_is_none_is_refused(place, tmp_path):
    import onnx

    path = tmp_path / "m.onnx"
    model = onnx.load(identity_model(path))
    weight = model.graph.initializer.add(name="w", dims=[1], data_type=1, data_location=1)
    for key, value in {"location": "w.bin", **place}.items():
        weight.external_data.add(key=key, value=value)
    onnx.save(model, path)
    (tmp_path / "w.bin").write_bytes(bytes(64))
    with pytest.raises(NotAModel, match="integers"):
        read_signature(path, name="m")


def test_a_tokenizer_is_bounded_and_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(TOKENIZER_BYTES_MAX + 1)
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for name, words in (
        ("pipe.json", "not a regular file"),
        ("large.json", "at most 134,217,728 bytes"),
        ("deep.json", "expected a tokenizer"),
    ):
        with pytest.raises(NotAModel, match=words):
            TextEncoder(tmp_path / name).ids("a")


async def test_an_order_that_is_too_large_is_none(tmp_path):
    with (tmp_path / "m.json").open("wb") as file:
        file.truncate(ORDER_BYTES_MAX + 1)
    os.mkfifo(tmp_path / "n.json")
    orders = DiskOrders(tmp_path)
    assert await orders.load("m", "digest") is None
    assert await orders.load("n", "digest") is None


# -- logs ------------------------------------------------------------------------------------------


@pytest.fixture
def log_folder(tmp_path) -> Path:
    folder = tmp_path / "log"
    write(folder, 4)
    return folder


def last_segment(folder: Path) -> Path:
    return max(folder.glob("*.jsonl"))


def append(folder: Path, data: bytes) -> None:
    with last_segment(folder).open("ab") as file:
        file.write(data)


def test_a_line_without_end_is_clipped_and_the_next_is_read(log_folder):
    whole = event_line(events(1, first=5)[0])
    begins_well = event_line(events(1, first=6)[0])[:-1]
    # Its beginning, up to where lines are clipped, is a sealed line.
    padded = begins_well + b" " * (LINE_BYTES_MAX - len(begins_well)) + b"x" * (200 << 20)
    append(log_folder, whole + padded + b"\n" + event_line(events(1, first=6)[0]))
    with little_memory():
        lines = list(read_lines(last_segment(log_folder)))
    assert [line.content is None for line in lines[-3:]] == [False, True, False]
    assert sum(line.length for line in lines) == last_segment(log_folder).stat().st_size
    assert len(lines[-2].data) <= LINE_BYTES_MAX + 1
    shown = list(show(log_folder, 5))
    assert [event["type"] == "unreadable" for event in shown] == [False, True, False]
    assert len(logged_line(shown[1])) < 300


def test_a_sealed_line_that_is_too_long_is_none(log_folder):
    long = seal(b'{"seq":5,"term":1,"at":1.0,"type":"' + b"x" * LINE_BYTES_MAX + b'","body":{}}')
    append(log_folder, long)
    assert list(show(log_folder))[-1]["type"] == "unreadable"
    found = scan(log_folder)
    assert (found.last_seq, found.cut_bytes) == (4, len(long))


def test_a_segment_without_end_is_no_segment(log_folder):
    with last_segment(log_folder).open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptLog, match=f"at most {SEGMENT_BYTES_MAX:,}"):
        list(show(log_folder))
    assert not verify(log_folder).ok


def test_a_log_of_pipes_is_unavailable(log_folder):
    os.mkfifo(log_folder / "99999999.jsonl")
    with pytest.raises(LogUnavailable, match="not a regular file"):
        list(show(log_folder))
    with pytest.raises(LogUnavailable, match="not a regular file"):
        verify(log_folder)


SEALED = {
    "no JSON": b"{]}",
    "no type": b'{"seq":5}',
    "a type that is none": b'{"seq":5,"term":1,"at":1.0,"type":[1],"body":{}}',
    "a number without end": b'{"seq":' + b"9" * 5000 + b',"type":"x"}',
    "nested": b'{"seq":5,"type":' + b"[" * 100_000 + b"}",
    "a time that is none": b'{"seq":5,"term":1,"at":1e300,"type":"x","body":{}}',
    "a body that is none": b'{"seq":5,"term":1,"at":1.0,"type":"x","body":[1]}',
    "no failure": b'{"seq":5,"term":1,"at":1.0,"type":"x","body":{"failure":{}}}',
    "no breakers": b'{"seq":5,"term":1,"at":1.0,"type":"x","body":{"breakers":{"m":1}}}',
    "codes": b'{"seq":5,"term":1,"at":1.0,"type":"\\u001b[2J","body":{"why":"\\u009b31m\\n"}}',
}


@pytest.mark.parametrize("content", SEALED.values(), ids=SEALED)
def test_an_event_of_any_form_is_shown_on_one_line(content, log_folder):
    append(log_folder, seal(content))
    for event in show(log_folder):
        line = logged_line(event)
        assert line.isprintable()
        assert len(line) < 500
    report = verify(log_folder)
    assert not report.ok or report.torn_bytes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{]}", "a checkpoint as JSON"),
        (b"[]}", "a checkpoint"),
        (b'{"lost":[["a",1]],"state":{}}', "not a checkpoint"),
        (b'{"lost":[1],"state":{}}', "not a checkpoint"),
        (b'{"lost":[],"state":{"no":"such"}}', "not a pool's state"),
        (b'{"state":' + b"[" * 100_000 + b"}", "at most 32 levels"),
        (b'{"state":[' + b"[]," * 2_000_000 + b"0]}", "2,000,000 values"),
    ],
    ids=["no JSON", "no object", "no events", "no pairs", "no state", "deep", "wide"],
)
def test_a_sealed_checkpoint_of_any_form_is_refused(content, words, log_folder):
    folder = copied(log_folder)
    (folder / "checkpoint-00000004.json").write_bytes(seal(content))
    with pytest.raises(CorruptLog, match=words):
        scan(folder)
    report = verify(folder)
    assert not report.ok


def test_a_mark_or_checkpoint_without_end_is_damage(log_folder):
    (log_folder / "checkpoint-00000004.json").unlink(missing_ok=True)
    with (log_folder / "acknowledged-0").open("wb") as file:
        file.truncate(1 << 40)
    with little_memory():
        found = scan(log_folder)
    assert [damage.file for damage in found.damage] == ["acknowledged-0"]
    assert found.state == state_of(4)


def test_the_command_survives_a_log_of_an_enemy(log_folder, tmp_path):
    pool = tmp_path / "state" / "p@1"
    pool.mkdir(parents=True)
    log_folder.rename(pool / "log")
    append(pool / "log", b"".join(seal(content) for content in SEALED.values()))
    done = CliRunner().invoke(app, ["log", "show", "--state-dir", str(tmp_path / "state")])
    assert done.exit_code == 0, done.exception
    assert all(line.isprintable() for line in done.output.splitlines())
    done = CliRunner().invoke(app, ["log", "verify", "--state-dir", str(tmp_path / "state")])
    assert done.exit_code in (0, 1), done.exception  # events that nobody acknowledged are cut off


# -- histories -------------------------------------------------------------------------------------


def test_a_history_whose_tables_are_views_is_none(tmp_path):
    path = tmp_path / "history.duckdb"
    opened(path).close()
    with closing(duckdb.connect(str(path))) as connection:
        connection.execute("DROP TABLE operations CASCADE")
        connection.execute("CREATE VIEW operations AS SELECT 1 AS seq FROM range(1000000000000)")
    with pytest.raises(HistoryUnavailable, match="not a history"):
        opened(path)


@pytest.mark.parametrize(
    "macro",
    [
        "bit_xor(x) AS (SELECT max(a.range * b.range) FROM range(10000000) a, range(10000000) b)",
        "duckdb_functions() AS TABLE SELECT true AS internal, 'x' AS function_name",
        "duckdb_tables() AS TABLE SELECT false AS internal, 'meta' AS table_name",
    ],
)
def test_a_history_with_functions_of_its_own_is_none(macro, tmp_path):
    path = tmp_path / "history.duckdb"
    opened(path).close()
    with closing(duckdb.connect(str(path))) as connection:
        connection.execute(f"CREATE MACRO {macro}")
    with pytest.raises(HistoryUnavailable, match="not a history"):
        opened(path)
    assert path.exists(), "it is not damaged, so it stays where it is"


def test_opening_is_interrupted_when_its_time_is_over(tmp_path, monkeypatch):
    path = tmp_path / "history.duckdb"
    opened(path).close()
    monkeypatch.setattr(history, "_PREPARE_SECONDS", 0.2)
    endless = "SELECT max(a.range * b.range) FROM range(10000000) a, range(10000000) b"
    monkeypatch.setattr(
        history.schema, "migration", lambda meta: [history.schema.Statement(endless)]
    )
    with pytest.raises(HistoryUnavailable, match=r"took longer to open than 0\.2 s"):
        opened(path)
    assert path.exists()


def test_a_history_reads_no_other_file_whatever_its_views_say(tmp_path):
    path, secret = tmp_path / "history.duckdb", tmp_path / "secret.csv"
    secret.write_text("a\nmine\n")
    opened(path).close()
    with closing(duckdb.connect(str(path))) as connection:
        connection.execute(
            f"CREATE OR REPLACE VIEW strategy_scores AS SELECT * FROM read_csv('{secret}')"
        )
    with (
        closing(opened(path)) as store,
        pytest.raises(BadInput, match="refused") as caught,
    ):
        store.query("SELECT * FROM strategy_scores")
    assert "mine" not in str(caught.value)


# -- what is printed -------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["[/nothing]", "[link=http://evil]here[/link]", "\x1b[2Jgone"])
def test_an_error_is_printed_as_it_is(words):
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    print_error(console, PoolError(f"no file {words}\nbut {words}"))
    output = console.file.getvalue()
    assert output.count(words.replace("\x1b", "\\x1b")) == 2
    assert all(line.isprintable() for line in output.splitlines())
