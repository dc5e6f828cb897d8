import json
import math
from dataclasses import fields, replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.breaker import Breaker, CircuitBreaker, Snapshot
from recovery.control import (
    Body,
    BrowserFailed,
    BrowserReady,
    BrowserRecord,
    BrowserWanted,
    Event,
    PoolClosing,
    PoolOpened,
    PoolState,
    Repair,
    apply,
)
from recovery.errors import InternalError
from recovery.failures import Failure
from recovery.log.codec import (
    EVENT_BYTES_MAX,
    CorruptLog,
    as_logged,
    decode,
    encode,
    event_from_plain,
    state_from_plain,
    state_to_plain,
    to_plain,
)
from recovery.plan import STRATEGIES
from recovery.records import BrowserFacts, HostRef, NumericId
from recovery.supervision import RestartLimit
from tests.fakes import FACTS, failure

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
).filter(lambda value: as_json(value) == value)
_EVIDENCE = st.dictionaries(st.text(), _JSON, max_size=4)
_NUMBER = st.floats(allow_nan=False)
_COUNT = st.integers(0, 2**53)


def as_json(value: Any) -> Any:
    """What JSON makes of `value`: infinities are no JSON."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except ValueError:
        return None


_FAILURES = st.builds(Failure, evidence=_EVIDENCE, at=_NUMBER, ref=st.none() | st.builds(HostRef))
_FACTS = st.builds(BrowserFacts)
_LIMITS = st.builds(
    RestartLimit,
    restarts_max=_COUNT,
    period_seconds=_NUMBER,
    delay_first_seconds=_NUMBER,
    delay_max_seconds=_NUMBER,
)
_REPAIRS = st.builds(Repair, failure=_FAILURES, began=_NUMBER, ready=st.none() | _NUMBER)
_RECORDS = st.builds(
    BrowserRecord,
    since=_NUMBER,
    facts=st.none() | _FACTS,
    numeric=st.dictionaries(st.text(), st.builds(NumericId), max_size=2),
    load_failures=st.dictionaries(st.text(), _FAILURES, max_size=2),
    restarts=st.lists(_NUMBER, max_size=3).map(tuple),
    failure=st.none() | _FAILURES,
)
STATES = st.builds(
    PoolState,
    limit=_LIMITS,
    browsers=st.dictionaries(st.text(), _RECORDS, max_size=2),
    repairs=st.lists(_REPAIRS, max_size=2).map(tuple),
)
_OPENED = CircuitBreaker("b", failure_threshold=1, recovery_timeout=0.0)
_OPENED.observe(failure())
_OPENED.success(_OPENED.allow())
_SNAPSHOTS = st.builds(Snapshot, breaker=st.sampled_from([Breaker(), _OPENED.breaker]), at=_NUMBER)
_TIME = st.floats(allow_nan=False, allow_infinity=False)


def event(body: Body, seq: int = 1) -> Event:
    return Event(seq, 1, 12.5, body)


@pytest.mark.parametrize("kind", get_args(Body), ids=lambda kind: kind.__name__)
def test_events_of_every_kind_come_back_as_they_were(kind):
    known = {
        "failure": _FAILURES,
        "facts": _FACTS,
        "limit": _LIMITS,
        "breakers": st.dictionaries(st.text(), _SNAPSHOTS, max_size=2),
    }
    named = {f.name: known[f.name] for f in fields(kind) if f.name in known}

    @given(st.builds(Event, _COUNT, _COUNT, _TIME, st.builds(kind, **named)))
    def check(event):
        line = encode(event)
        assert b"\n" not in line
        assert decode(line) == event
        plain = to_plain(event)
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain == json.loads(line)
        assert event_from_plain(plain) == event

    check()


@given(STATES)
def test_states_come_back_as_they_were(state):
    plain = state_to_plain(state)
    assert state_from_plain(json.loads(json.dumps(plain, allow_nan=False))) == state


def test_event_reads_as_a_person_would_write_it():
    assert to_plain(event(BrowserWanted("b", "chrome"))) == {
        "seq": 1,
        "term": 1,
        "at": 12.5,
        "type": "browser_wanted",
        "body": {"browser_id": "b", "kind": "chrome"},
    }


def test_event_of_an_older_version_gets_the_defaults_of_new_fields():
    plain = to_plain(event(BrowserReady("b", 0, FACTS)))
    plain["body"]["facts"] = {"product": "Fake", "version": "1"}
    assert event_from_plain(plain) == event(BrowserReady("b", 0, FACTS))


@pytest.mark.parametrize(
    "change",
    [
        {"type": "browser_married"},
        {"type": "Browser_Wanted"},
        {"body": {"browser_id": "b", "kind": "chrome", "colour": "red"}},
        {"body": {"browser_id": "b"}},
        {"body": {"browser_id": "b", "kind": "lynx"}},
        {"body": {"browser_id": 3, "kind": "chrome"}},
        {"body": None},
        {"seq": "1"},
        {"at": None},
        {"colour": "red"},
    ],
    ids=str,
)
def test_what_is_unknown_is_refused(change):
    plain = {**to_plain(event(BrowserWanted("b", "chrome"))), **change}
    with pytest.raises(CorruptLog):
        event_from_plain(plain)


@pytest.mark.parametrize(
    "change",
    [{"colour": "red"}, {"level": "heroic"}, {"browsers": {"b": {}}}, {"term": [1]}],
    ids=str,
)
def test_unknown_field_of_a_state_is_refused(change):
    with pytest.raises(CorruptLog):
        state_from_plain({**state_to_plain(PoolState()), **change})


@pytest.mark.parametrize("line", [b"", b"{}", b"[1]", b"null", b"\xff", b'{"seq":1}'], ids=repr)
def test_line_that_is_no_event_is_refused(line):
    with pytest.raises(CorruptLog):
        decode(line)


class Thing:
    def __repr__(self) -> str:
        return "a thing \ud800"


@pytest.mark.parametrize(
    "awkward",
    [
        {"message": "half a pair \ud800"},
        {"evidence": {"half \udfff": {"deep": ["\ud800"]}}},
        {"evidence": {"nothing": math.nan, "much": [math.inf, -math.inf]}},
        {"evidence": {"thing": Thing(), "bytes": b"\xff", "ref": HostRef("b", 1)}},
        {"evidence": {"pair": (1, 2), "set": {3}, "type": int, "error": ValueError("x")}},
        {"evidence": {1: "one", None: "none"}},
    ],
    ids=lambda awkward: ascii(awkward)[:40],
)
def test_evidence_that_json_cannot_carry_is_written_as_near_as_possible(awkward):
    original = event(BrowserFailed("b", 0, failure(**awkward)))
    logged = as_logged(original)
    assert as_logged(logged) == logged
    assert logged.body.failure.category == original.body.failure.category
    json.loads(json.dumps(to_plain(original), allow_nan=False))
    # A checkpoint of the state that came from it says the same as a replay.
    before = apply(PoolState(), event(BrowserWanted("b", "chrome")))
    state = apply(before, logged)
    assert state_from_plain(state_to_plain(state)) == state
    careless = state_from_plain(state_to_plain(apply(before, original)))
    assert careless.browsers["b"].epoch == state.browsers["b"].epoch


def test_evidence_that_is_too_long_is_clipped_and_the_event_is_kept():
    long = "\u00e4" * EVENT_BYTES_MAX
    evidence = {"log": long, "lines": list(range(EVENT_BYTES_MAX)), "what": "browser_exited"}
    original = event(BrowserFailed("b", 3, failure(message=long, evidence=evidence)))
    assert len(encode(original)) < EVENT_BYTES_MAX
    logged = as_logged(original)
    assert long.startswith(logged.body.failure.message)
    assert logged.body.failure.evidence["what"] == "browser_exited"
    assert as_logged(logged) == logged


def test_event_that_is_nonsense_is_refused_rather_than_written():
    for nonsense in (
        Event(1, 1, math.nan, PoolClosing()),
        Event(1, 1, 1.0, "browser_wanted"),
        event(BrowserWanted(7, "chrome")),
        event(BrowserWanted("b", "lynx")),
    ):
        with pytest.raises(InternalError):
            encode(nonsense)


def test_opening_keeps_a_limit_without_end():
    limit = RestartLimit(period_seconds=math.inf)
    opened = event(PoolOpened("p", "medium", STRATEGIES["progressive"], limit, 1))
    assert decode(encode(opened)) == opened
    assert decode(encode(replace(opened, seq=2))).body.limit.period_seconds == math.inf
