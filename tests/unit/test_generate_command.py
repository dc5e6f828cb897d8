import io
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from rich.console import Console
from typer.testing import CliRunner

from pool.commands import generate as generate_command
from pool.commands import main as cli
from pool.commands.generate import as_plain, parse_browsers, summary
from pool.commands.passage_view import Killed, PlainText, Screen, Written, picture, stage_state
from pool.demo.passage import KILL_AFTER, checked
from pool.execution.sequence import GeneratedToken, SequenceView, StageView
from pool.models import bundled as demo_models
from pool.results import RecoveryStep, Result
from recovery.errors import BadInput, LevelUnavailable, NotAModel, SetupError
from recovery.failures import categorize_browser_failure
from recovery.kinds import BrowserType, Level
from recovery.records import HostRef
from tests.unit.test_pipeline import DECODERS

LLAMA = DECODERS / "builder-llama.onnx"  # no tokenizer beside it
FAILED = RecoveryStep(
    "failed",
    "firefox-0#0 (stage 1, position 12)",
    0.5,
    0.004,
    "crash",
    categorize_browser_failure("it is gone", {"what": "crash", "ref": HostRef("firefox-0")}),
)
RESTORED = RecoveryStep(
    "restored", "safari-0#0 (stage 1, position 12)", 0.51, 0.02, "12 positions copied"
)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def model(tmp_path):
    """A folder with a model of 100 positions, and a tokenizer: a token for each word."""
    (tmp_path / "model.onnx").write_bytes(LLAMA.read_bytes())
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 100}')
    return tmp_path


@pytest.fixture(autouse=True)
def _no_browsers(monkeypatch):
    async def open_(self):
        raise AssertionError(f"{self!r} was opened")

    monkeypatch.setattr(generate_command.BrowserPool, "open", open_)


def generate(*arguments: object):
    return CliRunner().invoke(cli.app, ["generate", *map(str, arguments)])


def passage(killed: Killed | None = None, *, success: bool = True) -> Written:
    """A passage of three tokens over two stages, with one stage rebuilt."""
    tokens = [GeneratedToken(at, 4 + at, text) for at, text in enumerate("abc")]
    stages = (
        StageView("m@0", (0, 3), (HostRef("chrome-0", 2),), 6, False),
        StageView("m@1", (3, 4), (), 0, True),
    )
    result = Result(
        "op",
        "m",
        "generate",
        success,
        Level.MEDIUM,
        error="" if success else "no answer",
        metrics={"duration_ms": 2500.0, "tokens_per_second": 1.5, "first_token_ms": 500.0},
    )
    browsers = {"chrome-0": "Chromium 1.2"}
    view = SequenceView(stages, (FAILED, RESTORED))
    return Written("It is ", tokens, killed, view, browsers, result)


def drawn(written: Written, lines: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(picture(written, lines))
    return console.file.getvalue()


# -- what is asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--temperature", -1), "temperature: expected a number from 0 to 100"),
        (("--max-new-tokens", 0), "max_new_tokens: expected a whole number"),
        (("--top-p", 0), "top_p: expected"),
        (("--seed", -1), "seed: expected"),
        (("--kill", 0), "--kill: expected a number of tokens from 1 to 63"),
        (("--kill", 8, "--max-new-tokens", 8), "from 1 to 7"),
        (("--browsers", "chrome=x"), "--browsers: expected browsers and counts"),
        (("--browsers", "netscape=1"), "netscape"),
        (("--browsers", "chrome=0"), "browsers: expected 1 to 32"),
        (("--browsers", "chrome", "--level", "best"), "level: expected one of none, low"),
        (("--browsers", "chrome", "--strategy", "prayer"), "prayer"),
        (("--browsers", "chrome", "--backend", "cuda"), "backend: expected one of auto"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_starts(model, options, said):
    error = generate("--model", model, *options).exception
    assert isinstance(error, BadInput)
    assert said in str(error)


def test_too_few_browsers_for_a_level_are_refused(model):
    result = generate("--model", model, "--browsers", "chrome", "--level", "high")
    assert isinstance(result.exception, LevelUnavailable)


def test_models_that_take_no_text_are_refused(tmp_path):
    error = generate("--model", LLAMA).exception
    assert isinstance(error, BadInput)
    assert "no tokenizer.json beside it" in str(error)
    assert isinstance(generate("--model", tmp_path).exception, NotAModel)


def test_a_text_that_would_be_too_long_is_refused(model):
    error = generate("--model", model, "--browsers", "chrome", "--prompt", "so " * 37).exception
    assert isinstance(error, BadInput)
    assert "100" in str(error)


def test_what_is_not_installed_or_not_carried_is_named(monkeypatch, model, tmp_path):
    monkeypatch.setattr(generate_command, "installed_kinds", lambda: ())
    error = generate("--model", model).exception
    assert isinstance(error, SetupError)
    assert "tabpool doctor" in str(error)
    monkeypatch.setattr(demo_models, "_CARRIED", tmp_path / "nothing")
    error = generate().exception
    assert isinstance(error, SetupError)
    assert "kjv-llama" in str(error)


@pytest.mark.parametrize(
    ("text", "browsers"),
    [
        ("chrome=1,firefox=1,safari=1", {"chrome": 1, "firefox": 1, "safari": 1}),
        ("chrome", {"chrome": 1}),
        (" chromium = 2 , webkit", {"chrome": 2, "safari": 1}),
        ("chrome=1,chromium=2", {"chrome": 3}),
    ],
)
def test_browsers_are_read(text, browsers):
    assert parse_browsers(text) == browsers


@pytest.mark.parametrize("text", ["", "=1", "chrome=", "chrome=-1", "chrome=1.5", "chrome=٣", ","])
def test_what_names_no_browsers_is_refused(text):
    with pytest.raises(BadInput, match="--browsers"):
        parse_browsers(text)


def test_without_options_every_browser_here_gets_a_shard_at_level_high(monkeypatch, model):
    asked = []

    async def pretend(pool, path, shards, ask, shown, cause, notes):
        asked.append((pool.config.browsers, pool.config.level, shards, ask["text"], cause))
        return passage()

    monkeypatch.setattr(generate_command, "_generate", pretend)
    for kinds in ((BrowserType.CHROME, BrowserType.SAFARI), (BrowserType.FIREFOX,)):
        monkeypatch.setattr(generate_command, "installed_kinds", lambda kinds=kinds: kinds)
        assert generate("--model", model, "--prompt", "Lo").exit_code == 0
    assert asked == [
        ({"chrome": 1, "safari": 1}, "high", 2, "Lo", None),
        ({"firefox": 1}, "medium", 1, "Lo", None),
    ]


def test_a_lost_text_is_exit_code_1_and_json_is_all_there_is_on_stdout(monkeypatch, model):
    async def pretend(*_):
        return passage(success=False)

    monkeypatch.setattr(generate_command, "_generate", pretend)
    result = generate("--model", model, "--browsers", "chrome", "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert (said["success"], said["error"], said["text"]) == (False, "no answer", "abc")
    result = generate("--model", model, "--browsers", "chrome")
    assert result.stdout == ""  # the text was lost with those who were to write it
    assert "LOST: no answer" in result.stderr


def test_help_teaches_with_an_example():
    result = generate("--help")
    assert result.exit_code == 0
    assert 'tabpool generate --shards 3 --prompt "In the beginning" --kill 20' in result.stdout
    assert "Kill the browser of the middle stage" in result.stdout


def test_an_error_is_a_message_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tabpool", "generate", "--kill", "-3"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "BadInput: --kill: expected" in capsys.readouterr().err


# -- what is shown ---------------------------------------------------------------------------------


def test_the_picture_has_the_text_a_line_for_each_stage_and_what_happened():
    lines = [line.rstrip() for line in drawn(passage()).splitlines()]
    assert lines[0] == "It is abc"
    header, first, second = (line.split() for line in lines[2:5])
    assert header == ["stage", "layers", "browser", "kind", "position"]
    assert first == ["0", "0", "to", "2", "chrome-0#2", "Chromium", "1.2", "6", "running"]
    assert second == ["1", "3", "-", "-", "0", "waiting", "for", "a", "browser"]
    assert lines[5].strip() == "0.500 s  failed firefox-0#0 (stage 1, position 12): crash (4 ms)"
    assert "restored safari-0#0 (stage 1, position 12): 12 positions copied (20 ms)" in lines[6]


def test_a_kill_is_marked_where_it_fell():
    killed = Killed("firefox-0", 77, 1, after=2, at=0.4)
    assert drawn(passage(killed)).startswith("It is ab [SIGKILL firefox-0, stage 1, pid 77] c\n")


def test_of_a_long_text_the_screen_has_the_end():
    long = passage()
    long.tokens = [GeneratedToken(at, at, f"word{at} ") for at in range(500)]
    text = drawn(long, lines=20)
    assert "word499" in text
    assert "word100 " not in text
    assert len(text.splitlines()) <= 20
    assert "word100 " in drawn(long)


@pytest.mark.parametrize(
    ("where", "rebuilding", "words"),
    [
        ((), False, "not started"),
        ((HostRef("a"),), False, "running"),
        ((HostRef("a"),), True, "being rebuilt"),
        ((), True, "waiting for a browser"),
    ],
)
def test_a_stage_says_what_it_is_at(where, rebuilding, words):
    assert stage_state(StageView("m", None, where, 0, rebuilding)) == words


def test_plain_text_is_the_text_alone_unless_marks_are_wanted():
    killed = Killed("firefox-0", 77, 1, after=1, at=0.4)
    for mark, text in ((False, "ab\n"), (True, "a [SIGKILL firefox-0, stage 1, pid 77] b\n")):
        written, notes = [], []
        with PlainText(written.append, notes.append, mark=mark) as shown:
            shown.piece("a")
            shown.browser_killed(killed)
            shown.event(FAILED)
            shown.piece("b")
        assert "".join(written) == text
        assert len(notes) == (1 if mark else 2)
        assert "crash" in notes[-1]


def test_the_screen_leaves_the_whole_passage_behind():
    console = Console(file=io.StringIO(), width=100, height=20, force_terminal=True, no_color=True)
    with Screen(console) as screen:
        screen.update(Written("It is "))
        screen.update(passage())
    left = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).rpartition("It is")[2]
    assert left.startswith(" abc")
    assert "running" in left


def test_the_summary_says_what_was_held_and_what_was_done():
    killed = Killed("firefox-0", 77, 1, after=2, at=0.4)
    assert list(summary(passage(killed), "high")) == [
        "3 tokens in 2.50 s: 1.5 tokens/s, the first after 0.50 s",
        "killed (--kill) after 2 tokens: firefox-0 (stage 1, pid 77)",
        "failed: firefox-0#0; rebuilt: 1",
        "level: high requested, medium at the end",
    ]
    assert summary(passage(), "medium")[-1] == "level: medium"
    assert summary(passage(success=False), "medium")[-1] == "LOST: no answer"


def test_the_account_is_plain_json(model):
    killed = Killed("firefox-0", 77, 1, after=2, at=0.4)
    said = json.loads(json.dumps(as_plain(passage(killed), model, "high", "progressive")))
    assert said["tokens"] == [0, 1, 2]
    assert said["stages"][0] == {
        "layers": [0, 3],
        "browsers": ["chrome-0#2"],
        "kinds": ["Chromium 1.2"],
        "position": 6,
    }
    assert said["killed"]["pid"] == 77
    assert [step["what"] for step in said["recovery"]] == ["failed", "restored"]
    assert "it is gone" in said["recovery"][0]["failure"]


# -- the demonstration's verdict -------------------------------------------------------------------


def verdict(written: Written, right: Result) -> list[bool]:
    return list(checked(written, right, 3).values())


def test_the_demonstration_is_right_only_if_everything_is_the_same():
    values = {
        "tokens": np.arange(3),
        "text": "abc",
        "logits": np.array([[0.0, 1.0]], np.float32),
    }
    written = passage(Killed("firefox-0", 77, 1, after=KILL_AFTER, at=0.4))
    assert written.result is not None
    right = written.result = replace(written.result, values=values)
    assert verdict(written, right) == [True] * 5

    other = {**values, "logits": np.array([[-0.0, 1.0]], np.float32)}  # equal, and another bit
    assert verdict(written, replace(right, values=other)) == [True, True, True, False, True]
    other = {**values, "tokens": np.array([0, 1, 1])}
    assert verdict(written, replace(right, values=other))[2] is False
    other = {**values, "text": "abcc"}
    assert verdict(written, replace(right, values=other))[4] is False

    early = replace(written, killed=replace(written.killed, before=2))  # rebuilt before the kill
    assert verdict(early, right)[1] is False
    assert verdict(replace(written, killed=None), right)[:2] == [False, False]
    lost = replace(right, success=False)
    assert verdict(replace(written, result=lost), right)[2:] == [False] * 3
