import random
import statistics

import pytest

from recovery.history.significance import better, trend_direction, wilson


def test_noise_is_seldom_called_a_trend():
    rng = random.Random(2)
    called = [
        tuple_[0]
        for _ in range(2000)
        if (tuple_ := trend_direction(*_sums([rng.gauss(20, 10) for _ in range(10)])))[0]
        != "stable"
    ]
    assert len(called) < 0.02 * 2000


def _sums(ys):
    n, mean, centre = len(ys), statistics.fmean(ys), (len(ys) + 1) / 2
    sxx = sum((i - centre) ** 2 for i in range(1, n + 1))
    sxy = sum((i - centre) * (y - mean) for i, y in enumerate(ys, 1))
    return n, mean, sxx, sxy, sum((y - mean) ** 2 for y in ys)


def test_interval_of_a_rate_narrows_with_samples():
    few, many = wilson(9, 10), wilson(900, 1000)
    assert few == pytest.approx((0.5958, 0.9821), abs=1e-3)
    assert few[0] < many[0] < 0.9 < many[1] < few[1]


def test_browser_is_better_by_certain_reliability_or_by_a_tenth_of_the_time():
    one = {"score": 0.9, "reliability": 0.95, "median_ms": 100.0}
    assert not better(one, one)
    assert better(one, {**one, "reliability": 0.89})
    assert better({**one, "median_ms": 89.0}, one)
    assert not better({**one, "median_ms": 91.0}, one)
    assert not better({**one, "median_ms": None}, one)
