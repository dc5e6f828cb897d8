import math
from dataclasses import replace

from recovery.history.buffer import SampleBuffer
from tests.histories import OPERATION, op


def numbers(rows):
    return [row.values[2] for row in rows]


def test_what_could_not_be_written_comes_before_what_came_since():
    buffer = SampleBuffer(10)
    buffer.add([op(1), op(2)])
    taken = buffer.take()
    buffer.add([op(3)])
    buffer.put_back(taken)
    assert (numbers(buffer.take()), len(buffer), buffer.dropped) == (["1", "2", "3"], 0, 0)


def test_what_is_put_back_gives_way_as_the_oldest():
    buffer = SampleBuffer(2)
    buffer.add([op(1), op(2)])
    taken = buffer.take()
    buffer.add([op(3)])
    buffer.put_back(taken)
    assert (numbers(buffer.take()), buffer.dropped) == (["2", "3"], 1)


def test_only_the_first_refusal_is_told():
    buffer = SampleBuffer(10)
    assert buffer.add([op(1)]) == ""
    assert "expected a finite number" in buffer.add(
        [replace(OPERATION, duration_ms=math.nan), op(2)]
    )
    assert buffer.add([replace(OPERATION, duration_ms=math.nan)]) == ""
    assert (len(buffer), buffer.refused) == (2, 2)
