import asyncio
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pool.models.bundled import ocr_detector_path
from pool.ocr.reading import (
    LINE_WIDTH_MAX,
    Line,
    decode_line,
    prepare_lines,
    prepare_page,
    read_dictionary,
    read_page,
)
from pool.ocr.text_boxes import (
    BOXES_MAX,
    Box,
    PageScale,
    find_boxes,
    find_regions,
    in_reading_order,
)
from recovery.errors import BadInput, BrowserLost, SetupError
from sharding.models.native import NativeSession

PAGE = Path(__file__).parents[1] / "assets" / "reading"
WHITE = np.full((64, 96, 3), 255, np.uint8)
ABC = ("", "a", "b", "c", " ")


def scores(*classes: int, sure: float = 0.9) -> np.ndarray:
    """What the recogniser would say for these steps, with the letters of `ABC`."""
    array = np.full((1, len(classes), len(ABC)), (1 - sure) / (len(ABC) - 1), np.float32)
    array[0, range(len(classes)), classes] = sure
    return array


def text_map(*regions: Box, height: int = 64, width: int = 96, value: float = 0.9) -> np.ndarray:
    array = np.zeros((1, 1, height, width), np.float32)
    for box in regions:
        array[0, 0, box.top : box.bottom, box.left : box.right] = value
    return array


def same_size(height: int = 64, width: int = 96) -> PageScale:
    return PageScale(height, width, height, width)


# -- the page --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "seen"),
    [
        ((64, 96), (64, 96)),
        ((70, 100), (64, 96)),  # to the nearest multiple of 32
        ((900, 1240), (704, 960)),
        ((1240, 900), (960, 704)),
        ((1, 1), (32, 32)),
        ((10, 4000), (32, 960)),
    ],
)
def test_a_page_is_seen_in_multiples_of_32_up_to_a_bound(page, seen):
    prepared, scale = prepare_page(np.zeros((*page, 3), np.uint8))
    assert prepared.shape == (1, 3, *seen)
    assert prepared.dtype == np.float32
    assert prepared.flags.c_contiguous
    assert scale == PageScale(*page, *seen)


def test_the_bound_of_a_page_can_be_another():
    image = np.zeros((100, 400, 3), np.uint8)
    assert prepare_page(image, side_max=200)[0].shape == (1, 3, 64, 192)
    with pytest.raises(BadInput, match="at least 32, got 31"):
        prepare_page(image, side_max=31)


def test_a_page_is_scaled_as_paddle_does_with_blue_first():
    red = np.zeros((32, 32, 3), np.uint8)
    red[:, :, 0] = 255
    prepared, _ = prepare_page(red)
    expected = [-0.485 / 0.229, -0.456 / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(prepared[0, :, 5, 5], expected, rtol=1e-5)


def test_a_page_that_shrinks_is_averaged_and_one_that_grows_is_interpolated():
    stripes = np.zeros((32, 32 * 4, 3), np.uint8)
    stripes[:, ::2] = 200
    prepared, _ = prepare_page(stripes, side_max=32)
    grey = (100 / 255 - 0.485) / 0.229
    np.testing.assert_allclose(prepared[0, 0, :, 1:-1], grey, atol=1e-5)
    step = np.zeros((32, 16, 3), np.uint8)
    step[:, 8:] = 100
    (row,) = prepare_page(step)[0][:1, 0, 0] * 0.229 + 0.485
    np.testing.assert_allclose(row[13:19] * 255, [0, 0, 25, 75, 100, 100], atol=1e-3)


@pytest.mark.parametrize(
    "image",
    [
        [[[0, 0, 0]]],
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=lambda image: f"{np.asarray(image).dtype}{np.shape(image)}",
)
async def test_what_is_no_image_is_refused_before_any_model_is_asked(image):
    for refuse in (
        lambda: prepare_page(image),
        lambda: prepare_lines(image, []),
    ):
        with pytest.raises(BadInput, match="An image is an RGB array") as caught:
            refuse()
        assert caught.value.fields["expected"].startswith("uint8 (height, width, 3)")
        assert caught.value.fields["got"]
    with pytest.raises(BadInput, match="An image is an RGB array"):
        await read_page(image, never, never, ABC)


# -- boxes -----------------------------------------------------------------------------------------


def test_a_region_grows_as_its_box_is_unclipped():
    # 40 x 10 grow by 40 * 10 * 1.5 / (2 * 50) = 6 on each side.
    (box,) = find_boxes(text_map(Box(20, 20, 60, 30)), same_size())
    assert box == Box(14, 14, 66, 36)
    assert (box.width, box.height) == (52, 22)


def test_boxes_are_in_pixels_of_the_page_and_end_at_its_edge():
    twice = PageScale(128, 288, 64, 96)
    assert find_boxes(text_map(Box(20, 20, 60, 30)), twice) == [Box(42, 28, 198, 72)]
    assert find_boxes(text_map(Box(0, 0, 96, 64)), twice) == [Box(0, 0, 288, 128)]
    tiny = PageScale(1, 1, 64, 96)
    assert find_boxes(text_map(Box(20, 20, 60, 30)), tiny) == [Box(0, 0, 1, 1)]


def test_what_is_faint_or_small_is_no_text():
    wide = Box(20, 20, 60, 30)
    assert find_boxes(text_map(wide, value=0.59), same_size()) == []
    assert len(find_boxes(text_map(wide, value=0.61), same_size())) == 1
    assert find_boxes(text_map(Box(20, 20, 60, 22)), same_size()) == []
    assert len(find_boxes(text_map(Box(20, 20, 60, 23)), same_size())) == 1
    assert find_boxes(text_map(), same_size()) == []


def test_a_region_is_scored_by_its_own_pixels():
    tilted = text_map()
    for step in range(60):
        tilted[0, 0, 5 + step // 2 : 10 + step // 2, 10 + step] = 0.9  # a third of its bounds
    assert len(find_boxes(tilted, same_size())) == 1


def test_a_map_without_its_first_dimensions_is_taken():
    array = text_map(Box(20, 20, 60, 30))
    assert find_boxes(array[0, 0], same_size()) == find_boxes(array, same_size())


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((1, 1, 96, 64), np.float32), "is of shape"),
        (np.zeros((1, 64, 96), np.float32), "is of shape"),
        (np.zeros((1, 1, 64, 96), np.int64), "got int64"),
        (np.full((1, 1, 64, 96), np.nan, np.float32), "got nan"),
        (np.full((1, 1, 64, 96), 4, np.float32), "got 4 to 4"),
        (np.full((1, 1, 64, 96), -1, np.float32), "got -1 to -1"),
    ],
)
def test_what_is_no_map_of_this_page_is_refused(array, match):
    with pytest.raises(BadInput, match=match) as caught:
        find_boxes(array, same_size())
    assert {"expected", "got"} <= caught.value.fields.keys()


def test_of_too_many_boxes_the_largest_stay():
    side = 8 * 40
    array = np.zeros((side, side), np.float32)
    for row in range(40):
        for column in range(40):
            wide = 5 if row < 20 else 4
            array[row * 8 : row * 8 + 4, column * 8 : column * 8 + wide] = 1
    boxes = find_boxes(array, same_size(side, side))
    assert len(boxes) == BOXES_MAX
    assert len([box for box in boxes if box.top < side / 2 - 4]) == 800


@settings(deadline=None)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    )
)
def test_regions_are_those_that_a_flood_would_find(values):
    expected = []
    left_over = {(int(y), int(x)) for y, x in np.argwhere(values > 0.3)}
    while left_over:
        region, edge = set(), [left_over.pop()]
        while edge:
            y, x = edge.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left_over
            left_over -= near
            edge += near
        ys, xs = zip(*region, strict=True)
        mean = float(np.mean([values[pixel] for pixel in region]))
        expected.append(((min(xs), min(ys), max(xs) + 1, max(ys) + 1), pytest.approx(mean)))
    bounds, means = find_regions(values, 0.3)
    assert bounds.shape == (len(means), 4)
    found = [tuple(sides) for sides in bounds.tolist()]
    # Regions may share their bounds, so the means are sorted, too.
    assert sorted(zip(found, means.tolist(), strict=True)) == sorted(
        expected, key=lambda region: (region[0], region[1].expected)
    )


def test_boxes_are_read_by_row_and_then_from_the_left():
    title = Box(10, 0, 200, 30)
    left, middle, right = Box(10, 52, 60, 72), Box(80, 50, 120, 70), Box(150, 48, 200, 70)
    below = Box(10, 75, 200, 95)
    assert in_reading_order([below, right, left, title, middle]) == [
        title,
        left,
        middle,
        right,
        below,
    ]
    assert in_reading_order([]) == []


def test_a_tall_box_does_not_pull_the_rows_beside_it_together():
    tall = Box(0, 0, 20, 200)
    rows = [Box(40, top, 300, top + 20) for top in range(0, 200, 40)]
    assert [box for box in in_reading_order([tall, *reversed(rows)]) if box != tall] == rows


# -- lines -----------------------------------------------------------------------------------------


def test_a_line_is_48_high_and_padded_with_grey():
    (line,) = prepare_lines(WHITE, [Box(0, 0, 96, 24)])
    assert line.shape == (1, 3, 48, 320)
    assert line.dtype == np.float32
    assert line.flags.c_contiguous
    assert (line[..., :192] == 1).all()
    assert (line[..., 192:] == 0).all()
    (dark,) = prepare_lines(np.zeros_like(WHITE), [Box(0, 0, 96, 24)])
    assert (dark[..., :192] == -1).all()


def test_lines_have_few_widths_and_a_widest():
    wide = np.zeros((10, 9000, 3), np.uint8)
    boxes = [Box(0, 0, width, 10) for width in (1, 66, 67, 100, 8999)]
    boxes[0] = Box(0, 0, 9, 10)
    widths = [line.shape[3] for line in prepare_lines(wide, boxes)]
    assert widths == [320, 320, 352, 480, LINE_WIDTH_MAX]


def test_a_line_is_cut_out_of_its_page_with_blue_first():
    image = np.zeros((20, 40, 3), np.uint8)
    image[5:15, 10:30] = (0, 0, 255)
    (line,) = prepare_lines(image, [Box(10, 5, 30, 15)])
    np.testing.assert_allclose(line[0, 0, :, :96], 1, atol=1e-6)
    np.testing.assert_allclose(line[0, 1:, :, :96], -1, atol=1e-6)


def test_a_line_that_runs_down_the_page_is_turned():
    image = np.zeros((40, 20, 3), np.uint8)
    image[:20] = 255  # its beginning
    (line,) = prepare_lines(image, [Box(0, 0, 20, 40)])
    assert line.shape == (1, 3, 48, 320)
    np.testing.assert_allclose(line[..., :46], 1, atol=1e-6)
    np.testing.assert_allclose(line[..., 50:96], -1, atol=1e-6)


@pytest.mark.parametrize(
    "box",
    [Box(-1, 0, 5, 5), Box(0, 0, 97, 5), Box(0, 0, 5, 65), Box(5, 0, 5, 5), Box(0, 9, 5, 5)],
    ids=str,
)
def test_a_box_beyond_its_image_is_refused(box):
    with pytest.raises(BadInput, match="within its image"):
        prepare_lines(WHITE, [Box(0, 0, 5, 5), box])


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        ((1, 2, 3), "abc"),
        ((0, 1, 1, 0, 1, 2, 2, 0), "aab"),
        ((1, 4, 4, 2), "a b"),
        ((0, 0), ""),
        ((), ""),
    ],
)
def test_repeats_are_read_once_and_blanks_never(classes, text):
    read, confidence = decode_line(scores(*classes), ABC)
    assert read == text
    assert confidence == pytest.approx(0.9 if text else 0)


def test_confidence_is_the_mean_over_what_was_read():
    array = np.concatenate(
        [scores(1, sure=0.5), scores(0, sure=1.0), scores(2, 2, sure=0.75)], axis=1
    )
    assert decode_line(array, ABC) == ("ab", pytest.approx(0.625))


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (scores(1)[0], "expected \\(1, steps, 5\\), got \\(1, 5\\)"),
        (scores(1)[..., :4], "got \\(1, 1, 4\\)"),
        (np.concatenate([scores(1)] * 2), "got \\(2, 1, 5\\)"),
        (scores(1).astype(int), "got int64"),
        (scores(1) * np.float32(np.nan), "got nan"),
        (scores(1) * 20, "to 18"),
    ],
)
def test_what_are_no_scores_for_the_dictionary_is_refused(array, match):
    with pytest.raises(BadInput, match=match) as caught:
        decode_line(array, ABC)
    assert {"expected", "got"} <= caught.value.fields.keys()


@pytest.mark.parametrize("content", ["a\nb\n\u3000\n\u2028", "a\r\nb\r\n\u3000\r\n\u2028\r\n"])
def test_a_dictionary_begins_with_the_blank_and_ends_with_the_space(tmp_path, content):
    path = tmp_path / "keys.txt"
    path.write_bytes(content.encode())
    assert read_dictionary(path) == ("", "a", "b", "\u3000", "\u2028", " ")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "No such file"),
        (b"a\n\xff\n", "decode"),
        (b"a\n\nb\n", "line 2 empty"),
        (b"", "line 1 empty"),
        (b"a" * (17 << 20), "at most 16,777,216 bytes"),
    ],
    ids=["missing", "no UTF-8", "a gap", "empty", "large"],
)
def test_what_is_no_dictionary_is_refused(tmp_path, content, match):
    path = tmp_path / "keys.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=match) as caught:
        read_dictionary(path)
    assert {"expected", "got"} <= caught.value.fields.keys()


# -- a page through both ---------------------------------------------------------------------------


async def never(inputs):
    raise AssertionError("no model is to be asked")


def detector(*boxes: Box):
    async def detect(inputs):
        (page,) = inputs.values()
        assert list(inputs) == ["x"]
        return {"map": text_map(*boxes, height=page.shape[2], width=page.shape[3])}

    return detect


ROWS = tuple(Box(20, top, 80, top + 8) for top in range(10, 250, 24))
TALL = np.full((256, 96, 3), 255, np.uint8)


async def test_lines_come_in_reading_order_however_their_answers_do():
    calls = 0

    async def recognise(inputs):
        nonlocal calls
        calls += 1
        call = calls
        await asyncio.sleep(0.01 if call % 2 else 0)  # every other one is overtaken
        return {"scores": scores(*[1, 0] * call)}

    lines = await read_page(TALL, detector(*ROWS), recognise, ABC, lines_at_once=3)
    assert [line.text for line in lines] == ["a" * (index + 1) for index in range(len(ROWS))]
    assert lines[0] == Line("a", pytest.approx(0.9), find_first(ROWS[0]))
    assert [line.box.top for line in lines] == sorted(line.box.top for line in lines)


def find_first(row: Box) -> Box:
    (box,) = find_boxes(text_map(row, height=256), same_size(256))
    return box


@pytest.mark.parametrize("bound", [1, 3, 100])
async def test_no_more_lines_are_under_way_than_the_bound(bound):
    under_way = most = 0

    async def recognise(inputs):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        return {"scores": scores(1)}

    assert len(await read_page(TALL, detector(*ROWS), recognise, ABC, lines_at_once=bound)) == 10
    assert most == min(bound, len(ROWS))


async def test_an_empty_page_and_an_empty_line_give_no_line():
    assert await read_page(WHITE, detector(), never, ABC) == []

    async def recognise(inputs):
        return {"scores": scores(0, 4, 0)}

    assert await read_page(TALL, detector(*ROWS), recognise, ABC) == []


async def test_the_first_error_is_raised_as_it_is_and_ends_the_others():
    calls = ended = 0

    async def recognise(inputs):
        nonlocal calls, ended
        calls += 1
        if calls == 3:
            raise BrowserLost("gone")
        try:
            await asyncio.sleep(60)
        finally:
            ended += 1

    with pytest.raises(BrowserLost, match="gone"):
        await read_page(TALL, detector(*ROWS), recognise, ABC, lines_at_once=3)
    assert (calls, ended) == (3, 2)

    async def detect(inputs):
        raise BrowserLost("gone, too")

    with pytest.raises(BrowserLost, match="gone, too"):
        await read_page(TALL, detect, never, ABC)


async def test_cancelling_it_leaves_nothing_under_way():
    begun, ended = asyncio.Event(), 0

    async def recognise(inputs):
        nonlocal ended
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended += 1

    reading = asyncio.create_task(read_page(TALL, detector(*ROWS), recognise, ABC, lines_at_once=1))
    await begun.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert ended == 1


@pytest.mark.parametrize("dictionary", ["abc", None, (), ("a", "b"), ("",), ("", 1)], ids=str)
async def test_what_is_no_dictionary_is_refused_before_any_model_is_asked(dictionary):
    with pytest.raises(BadInput, match="A dictionary lists") as caught:
        await read_page(WHITE, never, never, dictionary)
    assert {"expected", "got"} <= caught.value.fields.keys()


async def test_a_bound_of_no_lines_is_refused_before_any_model_is_asked():
    with pytest.raises(BadInput, match="at least 1, got 0"):
        await read_page(WHITE, never, never, ABC, lines_at_once=0)


async def test_an_answer_of_several_outputs_is_refused():
    async def answer(inputs):
        return {"a": np.zeros(1), "b": np.zeros(1)}

    with pytest.raises(BadInput, match="detector"):
        await read_page(TALL, answer, never, ABC)
    with pytest.raises(BadInput, match="recogniser"):
        await read_page(TALL, detector(*ROWS), answer, ABC)


def read_png(path: Path) -> np.ndarray:
    """(height, width) of a PNG with 8 bits of grey and no row filtered, as `make.py` writes it."""
    data, at = path.read_bytes(), 8
    chunks = {}
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        chunks[kind] = data[at + 8 : at + 8 + size]
        at += size + 12
    width, height, *kind_of = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert kind_of == [8, 0, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


def distance(one: str, two: str) -> int:
    """Levenshtein's: characters to insert, delete or replace."""
    row = list(range(len(two) + 1))
    for index, letter in enumerate(one, 1):
        above, row = row, [index]
        for column, other in enumerate(two, 1):
            change = above[column - 1] + (letter != other)
            row.append(min(above[column] + 1, row[-1] + 1, change))
    return row[-1]


async def test_a_rendered_page_is_read_through_both_models():
    try:
        detector_path = ocr_detector_path()
    except SetupError as error:
        pytest.skip(str(error))
    paths = (detector_path, detector_path.with_name("ch_PP-OCRv4_rec_infer.onnx"))
    dictionary = read_dictionary(detector_path.with_name("ppocr_keys_v1.txt"))
    assert len(dictionary) == 6625
    assert "\u3000" in dictionary
    image = np.repeat(read_png(PAGE / "page.png")[:, :, np.newaxis], 3, axis=2)
    sessions = [NativeSession(path) for path in paths]
    for session in sessions:
        session.open()
    detect, recognise = (
        lambda inputs, session=session: asyncio.to_thread(session.run, inputs)
        for session in sessions
    )
    lines = await read_page(image, detect, recognise, dictionary, lines_at_once=2)
    for session in sessions:
        session.close()

    expected = (PAGE / "page.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(expected)
    read, wanted = ("\n".join(texts) for texts in ([line.text for line in lines], expected))
    accuracy = 1 - distance(read, wanted) / len(wanted)
    assert accuracy >= 0.95, read  # 1.0 where this was written
    assert min(line.confidence for line in lines) > 0.9
    for line in lines:
        assert (image[line.box.top : line.box.bottom, line.box.left : line.box.right] < 99).any()
