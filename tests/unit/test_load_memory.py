"""What a shard takes while it loads is estimated as elsewhere."""

from sharding.models.load_memory import LOAD_OVERHEAD_BYTES, PEAK_FACTOR, peak_bytes, room


def test_peak_is_twice_the_bytes_and_what_the_runtime_takes():
    assert peak_bytes(100) == PEAK_FACTOR * 100 + LOAD_OVERHEAD_BYTES


def test_room_is_as_many_bytes_as_load_within_the_memory():
    for size in (0, 1, 1 << 30):
        assert room(peak_bytes(size)) == size
        assert room(peak_bytes(size) - 1) == size - 1
    assert room(0) < 0
