"""What a shard takes while it loads is estimated as elsewhere."""

from sharding.cutting.memory import LOAD_OVERHEAD_BYTES, PEAK_FACTOR, peak_bytes, room


def test_peak_is_what_the_signature_of_a_model_says():
    from sharding.models import signature

    assert signature.LOAD_OVERHEAD_BYTES == LOAD_OVERHEAD_BYTES
    assert "twice the files' bytes" in signature.read_signature.__doc__
    assert peak_bytes(100) == PEAK_FACTOR * 100 + LOAD_OVERHEAD_BYTES


def test_room_is_as_many_bytes_as_load_within_the_memory():
    for size in (0, 1, 1 << 30):
        assert room(peak_bytes(size)) == size
        assert room(peak_bytes(size) - 1) == size - 1
    assert room(0) < 0
