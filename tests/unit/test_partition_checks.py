"""What cannot be right is refused before anything is searched."""

import math
import pickle

import pytest

from recovery.errors import BadInput
from sharding.cutting.partition import partition
from sharding.cutting.partition_checks import HOSTS_MAX, LAYERS_MAX
from sharding.cutting.spans import Ends, Host, Layer
from tests.partitions import (
    FOUR,
    MIB,
    NO_ENDS,
    TWO,
    evenly,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "component_based"}, "component_based cuts between models, see Model"),
        ({"strategy": "best"}, "expected one of layer_based, browser_based, optimal, got 'best'"),
        ({"layers": []}, f"layers: expected from 1 to {LAYERS_MAX} of them, got 0"),
        ({"layers": evenly(LAYERS_MAX + 1)}, f"got {LAYERS_MAX + 1}"),
        ({"hosts": []}, f"hosts: expected from 1 to {HOSTS_MAX} of them, got 0"),
        ({"hosts": [TWO[0], TWO[0]]}, "two hosts are called 'b0'.*name each once"),
        ({"shards": 0}, "shards: expected a whole number from 1, or None .*got 0"),
        ({"shards": -1}, "got -1"),
        ({"shards": 2.0}, r"got 2\.0"),
        ({"shards": True}, "got True"),
        ({"shards": math.nan}, "got nan"),
        (
            {"shards": 5},
            r"5 shards \(as requested\) are more than the 4 layers.*pass shards=2 or less",
        ),
        ({"shards": 3}, "3 shards are more than the 2 hosts.*add 1 browsers or pass shards=2"),
        (
            {"layers": FOUR[:1], "strategy": "browser_based", "shards": None},
            r"2 shards \(one for each host\) are more than the 1 layers.*pass shards=1",
        ),
        ({"layers": [Layer(-1.0, 1)]}, r"layers\[0\]\.seconds: expected a number from 0 to 86400"),
        ({"layers": [*FOUR, Layer(math.nan, 1)]}, r"layers\[4\]\.seconds: .*got nan"),
        ({"layers": [Layer(math.inf, 1)]}, r"layers\[0\]\.seconds: .*got inf"),
        ({"layers": [Layer("1", 1)]}, r"layers\[0\]\.seconds: .*got '1'"),
        ({"layers": [Layer(1.0, -1)]}, r"layers\[0\]\.bytes: .*got -1"),
        ({"layers": [Layer(1.0, 1.5)]}, r"layers\[0\]\.bytes: expected a whole number of bytes"),
        ({"layers": [Layer(1.0, math.nan)]}, r"layers\[0\]\.bytes: .*got nan"),
        ({"ends": Ends(embedding_bytes=-1)}, r"ends\.embedding_bytes: "),
        ({"ends": Ends(embedding_seconds=math.nan)}, r"ends\.embedding_seconds: "),
        ({"ends": Ends(head_bytes=1 << 64)}, r"ends\.head_bytes: "),
        ({"ends": Ends(head_seconds=-0.1)}, r"ends\.head_seconds: "),
        ({"hosts": [Host("b", -1)]}, r"hosts\[0\]\.capacity_bytes: "),
        ({"hosts": [Host("b", MIB, 0.0)]}, r"hosts\[0\]\.speed: .*1\.0 where it is unknown.*got 0"),
        ({"hosts": [Host("b", MIB, math.nan)]}, r"hosts\[0\]\.speed: .*got nan"),
        ({"hosts": [Host("b", MIB, -2.0)]}, r"hosts\[0\]\.speed: .*got -2"),
    ],
)
def test_what_cannot_be_right_is_refused(changes, message):
    call = {
        "layers": FOUR,
        "ends": NO_ENDS,
        "hosts": TWO,
        "shards": 2,
        "strategy": "optimal",
    } | changes
    with pytest.raises(BadInput, match=message) as caught:
        partition(
            call["layers"],
            call["ends"],
            call["hosts"],
            shards=call["shards"],
            strategy=call["strategy"],
        )
    assert {"expected", "got"} <= caught.value.fields.keys()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
