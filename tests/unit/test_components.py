import asyncio
import shutil
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper

from pool.execution.placed import run_stages
from pool.models.bundled import ocr_folder
from pool.models.components import example_for, find_reader
from pool.models.loading import read_parts
from pool.models.registry import ModelEntry, entry_from_plain, entry_to_plain
from pool.operations.embed import EMBED
from pool.operations.graph import INFERENCE
from pool.operations.read import prepare_read
from recovery.errors import BadInput, NotAModel, SetupError
from recovery.kinds import ModelType
from sharding.models.native import NativeSession
from sharding.models.signature import ModelSpec
from tests import models
from tests.unit.test_cut import DECODERS, ROUNDED
from tests.unit.test_reading import PAGE, TALL, distance, read_png

CLASSES = 5
ABC = "a\nb\nc\n"


class Native:
    """Asks the native runtime, and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._sessions: dict[str, NativeSession] = {}

    async def ask(self, spec: ModelSpec, tensors):
        self.asked.append(spec.name)
        session = self._sessions.get(spec.digest)
        if session is None:
            session = self._sessions[spec.digest] = NativeSession(spec.files[0].path)
            session.open()
        assert set(tensors) == {tensor.name for tensor in spec.inputs}
        return await asyncio.to_thread(session.run, tensors)


class Nobody:
    async def ask(self, spec, tensors):
        raise AssertionError("no part is to be asked")


def shaped_model(path, taken, given):
    """From an image to zeros of another shape: only what it takes and gives matters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = models.value("pixels", TensorProto.FLOAT, taken)
    zeros = models.value("y", TensorProto.FLOAT, given)
    return models.save(path, [helper.make_node("Identity", ["pixels"], ["y"])], [image], [zeros])


def detector(path):
    return shaped_model(path, ("n", 3, "h", "w"), ("n", 1, "a", "b"))


def recogniser(path, height=48, classes=CLASSES):
    return shaped_model(path, ("n", 3, height, "w"), ("n", "steps", classes))


@pytest.fixture
def folder(tmp_path):
    detector(tmp_path / "finds.onnx")
    recogniser(tmp_path / "reads.onnx")
    shaped_model(tmp_path / "turns.onnx", ("n", 3, "h", "w"), ("n", 2))
    (tmp_path / "keys.txt").write_text(ABC)
    return tmp_path


def components(path, **options) -> ModelEntry:
    return read_parts("ocr", path, strategy="component_based", **options)[0]


# -- loading ---------------------------------------------------------------------------------------


def test_each_model_of_a_folder_is_a_part_of_its_own(folder):
    entry, parts = read_parts("ocr", folder, strategy="component_based")
    assert entry.parts == ("ocr@finds", "ocr@reads", "ocr@turns")
    assert entry.in_parts
    assert tuple(part.spec for part in parts) == entry.components
    assert entry.spec.type is ModelType.VISION, "from the name it was given"
    assert entry_from_plain(entry_to_plain(entry)) == entry
    one = entry.component_entries()[1]
    assert (one.name, one.in_parts, one.parts) == ("ocr@reads", False, ("ocr@reads",))
    assert components(folder, type="audio").components[0].type is ModelType.AUDIO


def test_reader_is_found_by_shapes_whatever_its_parts_are_called(folder):
    entry = components(folder)
    reader = find_reader(entry.components)
    assert (reader.detector.name, reader.recogniser.name) == ("ocr@finds", "ocr@reads")
    assert reader.classes == CLASSES
    assert entry.dictionary.name == "keys.txt"
    assert example_for(entry, reader.detector)["pixels"].shape == (1, 3, 96, 160)
    assert example_for(entry, reader.recogniser)["pixels"].shape == (1, 3, 48, 320)
    assert example_for(entry, entry.components[2]) is None


def test_of_several_of_a_shape_the_name_decides(folder):
    detector(folder / "text_det.onnx")
    found = find_reader(components(folder).components)
    assert found.detector.name == "ocr@text_det"
    detector(folder / "det_small.onnx")
    assert find_reader(components(folder).components) is None


@pytest.mark.parametrize(
    ("height", "name", "found"),
    [(48, "m", True), ("h", "m", False), ("h", "rec", True), (32, "rec", False)],
)
def test_recogniser_takes_lines_as_high_as_they_are_made(tmp_path, height, name, found):
    detector(tmp_path / "finds.onnx")
    recogniser(tmp_path / f"{name}.onnx", height)
    (tmp_path / "keys.txt").write_text(ABC)
    assert (find_reader(components(tmp_path).components) is not None) is found


def test_folder_that_reads_nothing_is_loaded_and_refuses_to_read(tmp_path):
    models.add_model(tmp_path / "encoder.onnx")
    models.add_model(tmp_path / "decoder.onnx", amount=2.0)
    entry = components(tmp_path)
    assert entry.parts == ("ocr@decoder", "ocr@encoder")
    assert entry.dictionary is None
    with pytest.raises(BadInput, match="can't read"):
        prepare_read(entry, {"image": TALL})


def test_what_can_be_no_set_of_components_is_refused(folder, tmp_path):
    with pytest.raises(BadInput, match="uncut; omit shards="):
        components(folder, shards=2)
    with pytest.raises(NotAModel, match="2 to 64"):
        components(folder / "finds.onnx")
    with pytest.raises(BadInput, match="cannot name a model"):
        read_parts("a@b", folder, strategy="component_based")
    with pytest.raises(BadInput, match="no model type"):
        components(folder, type="smell")
    models.add_model(folder / "a name.onnx")
    with pytest.raises(NotAModel, match="cannot name a component"):
        components(folder)


def test_dictionary_must_have_as_many_characters_as_the_recogniser_has_classes(folder):
    (folder / "readme.txt").write_text("a\nb\nc\n")  # fits, but another is called keys
    (folder / "keys.txt").write_text("a\nb\n")
    with pytest.raises(NotAModel, match=r"of 3 lines, got keys\.txt \(2 lines\)") as caught:
        components(folder)
    assert caught.value.fields["got"] == {"keys.txt": 4}
    (folder / "dict_en.txt").write_text(ABC)
    assert components(folder).dictionary.name == "dict_en.txt"
    for name in ("keys.txt", "dict_en.txt"):
        (folder / name).unlink()
    assert components(folder).dictionary.name == "readme.txt"
    (folder / "readme.txt").unlink()
    with pytest.raises(NotAModel, match="got none"):
        components(folder)


def test_other_content_is_another_digest(folder):
    one = components(folder)
    assert components(folder).spec.digest == one.spec.digest
    (folder / "keys.txt").write_text("a\nb\nd\n")
    changed = components(folder)
    assert changed.spec.digest != one.spec.digest
    shaped_model(folder / "turns.onnx", ("n", 3, "h", "w"), ("n", 4))
    assert components(folder).spec.digest != changed.spec.digest
    with pytest.raises(NotAModel, match="has changed since"):
        prepare_read(one, {"image": TALL})
    (folder / "keys.txt").unlink()
    with pytest.raises(NotAModel, match="can't be read"):
        prepare_read(one, {"image": TALL})


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (None, "takes 'image'"),
        ({}, "takes 'image'"),
        ({"text": "a"}, "takes 'image'"),
        ({"image": TALL, "language": "en"}, "takes 'image'"),
        ({"image": TALL.astype(np.float32)}, "An image is an RGB array"),
        ({"image": TALL[:, :, 0]}, "An image is an RGB array"),
        ({"image": "page.png"}, "An image is an RGB array"),
    ],
)
def test_what_can_not_be_read_is_refused(folder, inputs, match):
    with pytest.raises(BadInput, match=match) as caught:
        prepare_read(components(folder), inputs)
    assert {"expected", "got"} <= caught.value.fields.keys()


async def test_page_without_text_has_no_lines(folder):
    entry = components(folder)

    class Blank:
        async def ask(self, spec, tensors):
            (page,) = tensors.values()
            return {"y": np.zeros((1, 1, *page.shape[2:]), np.float32)}

    values = await prepare_read(entry, {"image": TALL}).run(Blank())
    assert values.pop("text") == []
    assert {name: (a.dtype.kind, a.shape) for name, a in values.items()} == {
        "confidence": ("f", (0,)),
        "boxes": ("i", (0, 4)),
    }
    with pytest.raises(AssertionError, match="no part"):
        await prepare_read(entry, {"image": TALL}).run(Nobody())


async def test_rendered_page_is_read_by_the_components_of_a_folder(tmp_path):
    try:
        source = ocr_folder()
    except SetupError as error:
        pytest.skip(str(error))
    entry, parts = read_parts("ocr", source, strategy="component_based")
    reader = find_reader(entry.components)
    assert reader.classes == 6625
    for part in parts:
        if part.tried is not None:
            known = part.recording().run().answer
            assert {name: t.shape for name, t in known.inputs.items()} == {
                name: array.shape for name, array in part.tried.items()
            }, "the example suits it"
    image = np.repeat(read_png(PAGE / "page.png")[:, :, np.newaxis], 3, axis=2)
    native = Native()
    values = await prepare_read(entry, {"image": image}).run(native)
    wanted = (PAGE / "page.txt").read_text(encoding="utf-8").splitlines()
    assert {type(line) for line in values["text"]} == {str}
    assert (
        1 - distance("\n".join(values["text"]), "\n".join(wanted)) / len("\n".join(wanted)) > 0.95
    )
    assert values["boxes"].shape == (len(wanted), 4)
    assert (values["boxes"][:, :2] < values["boxes"][:, 2:]).all()
    assert (values["confidence"] > 0.9).all()
    assert native.asked[0] == reader.detector.name
    assert set(native.asked[1:]) == {reader.recogniser.name}

    for name in ("ch_PP-OCRv4_det_infer.onnx", "ch_PP-OCRv4_rec_infer.onnx"):
        (tmp_path / name).symlink_to(source / name)
    shutil.copy(source / "ppocr_keys_v1.txt", tmp_path)
    with (tmp_path / "ppocr_keys_v1.txt").open("a") as file:
        file.write("\nX\n")
    with pytest.raises(NotAModel, match="of 6623 lines"):
        components(tmp_path)


# -- cut encoders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["optimum-bert", "optimum-bert-int8"])
@pytest.mark.parametrize("shards", [1, 2, 3])
async def test_stages_of_an_encoder_give_what_the_uncut_one_does(
    monkeypatch, tmp_path, name, shards
):
    monkeypatch.setenv("TABPOOL_CACHE", str(tmp_path))
    path = DECODERS / f"{name}.onnx"
    entry, parts = read_parts("bert", path, shards=shards)
    assert not entry.pipeline.decoder
    assert len(entry.parts) == shards
    ids = np.random.default_rng(3).integers(1, 80, (2, 7))
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if any(tensor.name == "token_type_ids" for tensor in entry.spec.inputs):
        given["token_type_ids"] = np.zeros_like(ids)
    tensors = INFERENCE.prepare(entry, given, None)
    native = Native()
    values = await run_stages(native, entry.pipeline, [part.spec for part in parts], tensors)
    assert native.asked == list(entry.parts)
    right = await Native().ask(read_parts("bert", path)[0].spec, tensors)
    assert values.keys() == right.keys()
    for key, array in right.items():
        np.testing.assert_allclose(values[key], array, rtol=0, atol=ROUNDED.get(name, 0.0))
    vectors = EMBED.finish(entry, tensors, values)["embedding"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert all(part.recording().run().answer is not None for part in parts)


def test_entry_without_parts_is_as_before(tmp_path):
    entry = read_parts("m", models.add_model(tmp_path / "m.onnx"))[0]
    assert (entry.parts, entry.in_parts, entry.component_entries()) == (("m",), False, ())
    assert replace(entry, components=()) == entry
