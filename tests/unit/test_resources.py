import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.resources import (
    MIB,
    BrowserLoad,
    NodeLoad,
    Park,
    Recycle,
    ResourceLimits,
    refuse_load,
    relieve,
)

LIMITS = ResourceLimits()
WEARING = ResourceLimits(recycle_seconds=3600.0, recycle_operations=1000, recycle_bytes=1000 * MIB)
ROOMY = NodeLoad("n", 10_000 * MIB, 9_000 * MIB)
SHORT = NodeLoad("n", 10_000 * MIB, 1_000 * MIB)


def browser(browser_id: str = "b", **more) -> BrowserLoad:
    usual = {
        "epoch": 3,
        "node": "n",
        "age_seconds": 600.0,
        "served": 10,
        "memory_bytes": 400 * MIB,
        "queue": 0,
        "idle_seconds": 0.0,
        "ready": True,
        "models": {},
    }
    return BrowserLoad(browser_id, **(usual | more))


def ids(actions) -> list[str]:
    return [one.model if isinstance(one, Park) else one.browser_id for one in actions]


# -- parking ---------------------------------------------------------------------------------------


def test_idle_model_is_parked_when_memory_is_short():
    (action,) = relieve(LIMITS, [SHORT], [browser(models={"bert": 45.0})])
    assert action == Park(
        "bert", "not used for 45 s, and node n has 1000 MiB of 10000 MiB available"
    )


@pytest.mark.parametrize(
    ("available", "parked"), [(1_499, ["bert"]), (1_500, []), (9_000, [])], ids=str
)
def test_nothing_is_parked_unless_less_than_the_low_mark_is_available(available, parked):
    node = NodeLoad("n", 10_000, available)
    assert ids(relieve(LIMITS, [node], [browser(models={"bert": 45.0})])) == parked


@pytest.mark.parametrize(
    ("models", "parked"),
    [
        ([{"a": 40.0, "b": 50.0}], ["b"]),  # idle longest
        ([{"b": 50.0, "a": 50.0}], ["a"]),  # by name
        ([{"a": 30.0}], ["a"]),
        ([{"a": 29.9}], []),
        ([{"a": 900.0}, {"a": 1.0}], []),  # in use on another browser
        ([{"a": 900.0, "b": 50.0}, {"a": 40.0}], ["b"]),
        ([{}, {}], []),
        ([], []),
    ],
)
def test_model_that_is_parked_is_idle_longest_over_all_browsers(models, parked):
    browsers = [browser(f"b{n}", models=held) for n, held in enumerate(models)]
    assert ids(relieve(LIMITS, [SHORT], browsers)) == parked


def test_model_on_a_busy_browser_may_be_parked():
    assert ids(relieve(LIMITS, [SHORT], [browser(queue=3, models={"a": 40.0})])) == ["a"]


def test_pressure_on_a_node_without_browsers_is_somebody_elses():
    elsewhere = replace(SHORT, node="other")
    assert relieve(LIMITS, [elsewhere, ROOMY], [browser(models={"a": 40.0})]) == ()


def test_model_that_frees_nothing_where_memory_is_short_is_not_parked():
    nodes = [SHORT, replace(ROOMY, node="roomy")]
    browsers = [browser("a", models={"x": 40.0}), browser("b", node="roomy", models={"y": 90.0})]
    assert ids(relieve(LIMITS, nodes, browsers)) == ["x"]


def test_use_on_a_node_with_enough_memory_counts_too():
    nodes = [SHORT, replace(ROOMY, node="roomy")]
    browsers = [browser("a", models={"x": 40.0}), browser("b", node="roomy", models={"x": 1.0})]
    assert relieve(LIMITS, nodes, browsers) == ()


def test_node_whose_memory_is_unknown_is_not_under_pressure():
    assert relieve(LIMITS, [NodeLoad("n", 0, 0)], [browser(models={"a": 40.0})]) == ()


# -- wear ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "why"),
    [
        ({"age_seconds": 3600.0}, "3600 s old, of at most 3600 s"),
        ({"served": 1000}, "served 1000 operations, of at most 1000"),
        ({"memory_bytes": 1200 * MIB}, "holds 1200 MiB, of at most 1000 MiB"),
        ({"age_seconds": 3700.0, "served": 3000}, "served 3000 operations, of at most 1000"),
    ],
    ids=str,
)
def test_worn_browser_is_recycled_when_idle(load, why):
    worn = browser(idle_seconds=30.0, **load)
    assert relieve(WEARING, [ROOMY], [worn]) == (Recycle("b", 3, why),)


def test_browser_below_every_limit_goes_on():
    load = browser(idle_seconds=1e6, age_seconds=3599.0, served=999, memory_bytes=1000 * MIB - 1)
    assert relieve(WEARING, [ROOMY], [load]) == ()


def test_no_browser_is_worn_by_default():
    load = browser(idle_seconds=1e6, age_seconds=1e9, served=10**9, memory_bytes=10**12)
    assert relieve(LIMITS, [ROOMY], [load]) == ()


@pytest.mark.parametrize(
    ("load", "other", "recycled"),
    [
        ({"idle_seconds": 30.0}, None, True),
        ({"idle_seconds": 29.0}, None, False),
        ({"idle_seconds": 0.0}, {"queue": 5}, True),  # the other takes over
        ({"idle_seconds": 0.0}, {"ready": False}, False),
        ({"idle_seconds": 30.0, "ready": False}, {}, False),
        ({"idle_seconds": 30.0, "queue": 1}, {}, False),
        ({"idle_seconds": 0.0, "queue": 1}, {}, False),
    ],
    ids=str,
)
def test_moment_at_which_a_worn_browser_is_recycled(load, other, recycled):
    browsers = [browser(served=2000, **load)]
    if other is not None:
        browsers.append(browser("other", **other))
    assert ids(relieve(WEARING, [ROOMY], browsers)) == (["b"] if recycled else [])


def test_most_worn_browser_comes_first_and_alone():
    browsers = [
        browser("a", age_seconds=4000.0),
        browser("b", served=2500),
        browser("c", memory_bytes=2500 * MIB),
        browser("d", served=9000, queue=1),
    ]
    assert ids(relieve(WEARING, [ROOMY], browsers)) == ["b"]  # as worn as c, so by name


def test_only_one_browser_is_recycled_at_a_time():
    browsers = [browser("a", served=2000, idle_seconds=99.0), browser("b", served=2000)]
    assert relieve(WEARING, [ROOMY], browsers, recycling=True) == ()


def test_parking_goes_on_while_a_browser_is_recycled():
    browsers = [browser("a", served=2000), browser("b", models={"x": 40.0})]
    assert ids(relieve(WEARING, [SHORT], browsers)) == ["x", "a"]
    assert ids(relieve(WEARING, [SHORT], browsers, recycling=True)) == ["x"]


# -- swollen browsers ------------------------------------------------------------------------------


def pool(*sizes: int, **more) -> list[BrowserLoad]:
    return [
        browser(f"b{n}", **({"memory_bytes": size * MIB} | more)) for n, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("sizes", "recycled"),
    [
        ((400, 400, 601), ["b2"]),
        ((400, 400, 600), []),
        ((400, 700, 800, 400, 400), ["b2"]),  # the largest
        ((800, 800, 400, 400, 400), ["b0"]),  # by name
        ((400, 1_300), ["b1"]),  # of two, the median is between them
        ((400, 1_200), []),
        ((9_000,), []),
        ((0, 0, 900), []),  # unknown sizes say nothing of what is usual
        ((), []),
    ],
    ids=str,
)
def test_browser_much_larger_than_usual_is_recycled_when_memory_is_short(sizes, recycled):
    assert ids(relieve(LIMITS, [SHORT], pool(*sizes))) == recycled
    assert relieve(LIMITS, [ROOMY], pool(*sizes)) == ()
    assert relieve(LIMITS, [SHORT], pool(*sizes), recycling=True) == ()


def test_swollen_browser_is_named_with_what_is_usual():
    (action,) = relieve(LIMITS, [SHORT], pool(400, 400, 900))
    assert action == Recycle(
        "b2",
        3,
        "holds 900 MiB where 400 MiB are usual, and node n has 1000 MiB of 10000 MiB available",
    )


def test_swollen_browser_stays_while_a_model_can_be_parked():
    assert ids(relieve(LIMITS, [SHORT], pool(400, 400, 900, models={"x": 40.0}))) == ["x"]
    assert ids(relieve(LIMITS, [SHORT], pool(400, 400, 900, models={"x": 4.0}))) == ["b2"]


@pytest.mark.parametrize(
    "change",
    [{"queue": 1}, {"ready": False}, {"node": "roomy"}, {"age_seconds": 29.0}],
    ids=str,
)
def test_swollen_browser_stays_if_busy_or_away_or_elsewhere_or_new(change):
    nodes = [SHORT, replace(ROOMY, node="roomy")]
    *others, last = pool(400, 400, 900)
    assert ids(relieve(LIMITS, nodes, [*others, last])) == ["b2"]
    assert relieve(LIMITS, nodes, [*others, replace(last, **change)]) == ()


# -- refusing loads --------------------------------------------------------------------------------


def test_load_that_leaves_too_little_is_refused_with_numbers_and_a_remedy():
    why = refuse_load(LIMITS, [SHORT], pool(400, 400), 150 * MIB)
    assert why == (
        "node n: 300 MiB would be needed at the peak (2 x 150 MiB), 1000 MiB of 10000 MiB are "
        "available and 800 MiB must stay free, which is 100 MiB too little. Use fewer browsers, "
        "unload a model or give the node more memory."
    )


@pytest.mark.parametrize(
    ("browsers", "peak", "refused"),
    [
        (2, 100, False),  # leaves exactly the minimum
        (2, 101, True),
        (1, 200, False),
        (3, 100, True),
        (0, 10**6, False),  # nobody would load it
    ],
)
def test_all_ready_browsers_of_a_node_load_at_once(browsers, peak, refused):
    loads = pool(*[400] * browsers)
    starting = browser("starting", ready=False)
    why = refuse_load(LIMITS, [SHORT], [*loads, starting], peak * MIB)
    assert bool(why) is refused


def test_each_node_bears_its_own_browsers_only():
    nodes = [SHORT, replace(SHORT, node="m")]
    spread = [browser("a"), browser("b", node="m")]
    assert refuse_load(LIMITS, nodes, spread, 150 * MIB) == ""
    assert refuse_load(LIMITS, nodes, pool(400, 400), 150 * MIB).startswith("node n:")


def test_node_that_lacks_most_is_named():
    nodes = [SHORT, replace(SHORT, node="m", available_bytes=900 * MIB)]
    spread = [browser("a"), browser("b", node="m")]
    assert refuse_load(LIMITS, nodes, spread, 300 * MIB).startswith("node m:")


def test_node_of_which_nothing_is_known_refuses_nothing():
    assert refuse_load(LIMITS, [], [browser()], 10**15) == ""
    assert refuse_load(LIMITS, [NodeLoad("n", 0, 0)], [browser()], 10**15) == ""


# -- properties ------------------------------------------------------------------------------------

seconds = st.floats(0, 1e5)
names = st.sampled_from("mno")
some_nodes = st.lists(
    st.builds(NodeLoad, names, st.integers(0, 2**36), st.integers(0, 2**36)),
    max_size=3,
    unique_by=lambda load: load.node,
)
some_browsers = st.lists(
    st.builds(
        BrowserLoad,
        browser_id=st.sampled_from("abcdef"),
        epoch=st.integers(0, 9),
        node=names,
        age_seconds=seconds,
        served=st.integers(0, 10_000),
        memory_bytes=st.integers(0, 2**32),
        queue=st.integers(0, 2),
        idle_seconds=seconds,
        ready=st.booleans(),
        models=st.dictionaries(st.sampled_from("xyz"), seconds),
    ),
    max_size=6,
    unique_by=lambda load: load.browser_id,
)
some_limits = st.sampled_from([LIMITS, WEARING, ResourceLimits(memory_low=0.9, idle_seconds=1.0)])


@given(some_limits, some_nodes, some_browsers)
def test_only_a_ready_browser_without_a_queue_is_recycled(limits, nodes, browsers):
    by_id = {load.browser_id: load for load in browsers}
    for action in relieve(limits, nodes, browsers):
        if isinstance(action, Recycle):
            load = by_id[action.browser_id]
            assert (load.ready, load.queue, load.epoch) == (True, 0, action.epoch)
            others = [other for other in browsers if other is not load and other.ready]
            assert others or load.idle_seconds >= limits.idle_seconds


@given(some_limits, some_nodes, some_browsers)
def test_no_model_in_use_is_parked(limits, nodes, browsers):
    for action in relieve(limits, nodes, browsers):
        if isinstance(action, Park):
            ages = [load.models[action.model] for load in browsers if action.model in load.models]
            assert min(ages) >= limits.idle_seconds


@given(some_limits, some_nodes, some_browsers, st.booleans())
def test_one_of_each_at_most_and_none_while_recycling(limits, nodes, browsers, recycling):
    kinds = [type(one) for one in relieve(limits, nodes, browsers, recycling=recycling)]
    assert kinds in ([], [Park], [Park, Recycle], [Recycle])
    assert not (recycling and Recycle in kinds)


@given(some_limits, some_nodes, some_browsers, st.randoms(use_true_random=False))
def test_order_of_what_was_measured_does_not_matter(limits, nodes, browsers, random):
    actions = relieve(limits, nodes, browsers)
    why = refuse_load(limits, nodes, browsers, 2**30)
    random.shuffle(nodes)
    random.shuffle(browsers)
    assert relieve(limits, nodes, browsers) == actions
    assert refuse_load(limits, nodes, browsers, 2**30) == why


@given(some_limits, some_nodes, some_browsers, st.integers(0, 2**34))
def test_larger_model_is_refused_where_a_smaller_one_is(limits, nodes, browsers, peak):
    if refuse_load(limits, nodes, browsers, peak):
        assert refuse_load(limits, nodes, browsers, peak * 2)


@given(some_nodes, some_browsers)
def test_parking_and_recycling_come_to_an_end(nodes, browsers):
    """Carried out one by one, they leave nothing to do, though memory stays as short as it was."""
    limits = ResourceLimits(memory_low=0.9, recycle_seconds=3600.0, recycle_operations=1000)
    for _ in range(20):
        actions = relieve(limits, nodes, browsers)
        if not actions:
            return
        for action in actions:
            if isinstance(action, Park):
                browsers = [
                    replace(
                        load, models={m: s for m, s in load.models.items() if m != action.model}
                    )
                    for load in browsers
                ]
            else:
                new = {"age_seconds": 0.0, "served": 0, "idle_seconds": 0.0}
                browsers = [
                    replace(load, **new) if load.browser_id == action.browser_id else load
                    for load in browsers
                ]
    raise AssertionError("it goes on for ever")


def test_everything_that_crosses_processes_pickles():
    things = [WEARING, ROOMY, browser(models={"a": 1.0}), Park("a", "idle"), Recycle("b", 1, "old")]
    assert pickle.loads(pickle.dumps(things)) == things
