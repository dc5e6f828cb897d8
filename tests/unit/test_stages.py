"""Stages: what a pipeline of them is, and what each takes in a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recovery.errors import BadInput, NotAModel
from sharding.cutting.cut import cut
from sharding.cutting.layers import find_boundaries
from sharding.models.signature import TensorSpec
from sharding.sequences.stages import (
    StagePipeline,
    check_length,
    decoder_pipeline,
    example,
    inputs_of_step,
    pipeline_of_manifest,
    pipeline_of_map,
    stage_name,
    stage_specs,
)

DECODERS = Path(__file__).parent.parent / "assets" / "decoders"
WIDTH = 3
HIDDEN = TensorSpec("hidden", "float32", (1, "s", WIDTH))
IDS = TensorSpec("input_ids", "int64", ("b", "s"))


def line_of(name: str) -> StagePipeline:
    return pipeline_of_map("m", find_boundaries(DECODERS / f"{name}.onnx"))


def test_inputs_of_a_step_without_position_ids():
    made = line_of("builder-llama").inputs_of_step([7, 8], 3)
    assert list(made) == ["input_ids", "attention_mask"]
    assert made["input_ids"].tolist() == [[7, 8]]
    assert made["attention_mask"].tolist() == [[1] * 5]
    assert made["input_ids"].dtype == np.int64


@pytest.mark.parametrize("name", ["builder-llama-positions", "optimum-llama", "optimum-gpt2"])
def test_inputs_of_a_step_with_position_ids(name):
    made = line_of(name).inputs_of_step([7, 8], 3)
    assert made["position_ids"].tolist() == [[3, 4]]
    assert made["attention_mask"].shape == (1, 5)
    assert made["input_ids"].shape == (1, 2)


def test_inputs_have_the_dtypes_that_the_graph_takes():
    specs = [
        TensorSpec("attention_mask", "float32", ("b", "t")),
        TensorSpec("position_ids", "int32", ("b", "s")),
        TensorSpec("token_type_ids", "int64", ("b", "s")),
    ]
    made = inputs_of_step(specs, [7, 8], 3)
    assert {name: array.dtype.name for name, array in made.items()} == {
        "attention_mask": "float32",
        "position_ids": "int32",
        "token_type_ids": "int64",
    }
    assert made["token_type_ids"].tolist() == [[0, 0]]
    assert all(array.flags.c_contiguous for array in made.values())


@pytest.mark.parametrize("name", ["optimum-bert", "optimum-bert-int8"])
def test_encoder_can_not_generate(name):
    pipeline = line_of(name)
    assert not pipeline.decoder
    with pytest.raises(NotAModel, match="expected caches, got none"):
        pipeline.check_generates()
    assert decoder_pipeline("m", DECODERS / f"{name}.onnx") is None


def test_export_that_takes_embeddings_can_not_generate():
    pipeline = line_of("builder-llama-embeds")
    assert pipeline.decoder
    with pytest.raises(NotAModel, match="inputs_embeds"):
        pipeline.check_generates()
    assert decoder_pipeline("m", DECODERS / "builder-llama-embeds.onnx") is None


@pytest.mark.parametrize("name", ["optimum-bert", "builder-llama-embeds"])
def test_cut_models_that_can_not_generate_say_so_too(name, tmp_path):
    manifest = cut(DECODERS / f"{name}.onnx", [(0, 1), (1, 3)], tmp_path)
    with pytest.raises(NotAModel, match="m can't generate"):
        pipeline_of_manifest("m", manifest).check_generates()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": (TensorSpec("attention_mask", "int64", ("b", "t")),)}, "expected input_ids"),
        ({"outputs": (HIDDEN,)}, "an output 'logits'"),
        ({"inputs": (IDS, TensorSpec("seqlens_k", "int32", ("b",)))}, "seqlens_k"),
    ],
)
def test_line_without_what_text_takes_says_what_it_lacks(changes, words):
    with pytest.raises(NotAModel, match=words):
        replace(line_of("builder-llama"), **changes).check_generates()


@pytest.mark.parametrize("shape", [None, ("b", 2, "t", "d"), ("b", 2, 8, WIDTH)])
def test_cache_that_does_not_grow_along_one_dimension_is_refused(shape):
    layers = find_boundaries(DECODERS / "builder-llama.onnx")
    (cache, *others) = layers.layers[0].caches
    odd = replace(cache, past=replace(cache.past, shape=shape))
    first = replace(layers.layers[0], caches=(odd, *others))
    with pytest.raises(NotAModel, match="a cache"):
        pipeline_of_map("m", replace(layers, layers=(first, *layers.layers[1:])))


def test_file_that_is_no_model_is_no_decoder(tmp_path):
    path = tmp_path / "no.onnx"
    path.write_bytes(b"nothing of the kind")
    assert decoder_pipeline("m", path) is None


def test_uncut_decoder_is_its_own_only_stage():
    pipeline = decoder_pipeline("m", DECODERS / "builder-llama.onnx")
    assert pipeline is not None
    (stage,) = pipeline.stages
    assert stage.model == "m"
    assert stage.last
    assert stage.copyable
    assert len(stage.caches) == 6
    assert stage.caches[0].shape == (1, 1, 0, 16)
    assert stage.caches[0].axis == 2


def test_ring_has_its_window_and_no_axis():
    pipeline = decoder_pipeline("m", DECODERS / "builder-gemma2.onnx")
    assert pipeline is not None
    (stage,) = pipeline.stages
    assert not stage.copyable
    (ring, *_) = [cache for cache in stage.caches if cache.axis < 0]
    assert ring.shape == (1, 1, 16, 16)


def test_stages_of_a_cut_model_hand_on_and_share_its_caches(tmp_path):
    manifest = cut(DECODERS / "builder-llama.onnx", [(0, 1), (1, 2), (2, 3)], tmp_path)
    pipeline, whole = pipeline_of_manifest("m", manifest), line_of("builder-llama")
    pipeline.check_generates()
    assert [stage.model for stage in pipeline.stages] == [stage_name("m", n) for n in range(3)]
    assert [stage.last for stage in pipeline.stages] == [False, False, True]
    for before, after in zip(pipeline.stages, pipeline.stages[1:], strict=False):
        assert before.sends == after.receives
    caches = [cache for stage in pipeline.stages for cache in stage.caches]
    assert sorted(map(str, caches)) == sorted(map(str, whole.stages[0].caches))
    assert pipeline.inputs == whole.inputs
    specs = stage_specs("m", tmp_path, manifest)
    assert [spec.span for spec in specs] == [(0, 1), (1, 2), (2, 3)]
    for stage, spec in zip(pipeline.stages, specs, strict=True):
        assert spec.caches == stage.caches
        made = example(stage)
        assert made.keys() == {tensor.name for tensor in spec.inputs}
        assert all(made[tensor.name].dtype == tensor.dtype for tensor in spec.inputs)


# -- length ----------------------------------------------------------------------------------------


def test_length_within_the_models_positions_is_fine():
    check_length(5, 3, 8)
    check_length(5, 3, None)
    check_length(1, 1, 2)


def test_empty_prompt_is_refused_whatever_the_limit():
    for limit in (None, 8):
        with pytest.raises(BadInput, match="prompt is empty"):
            check_length(0, 3, limit)


def test_too_many_tokens_are_refused_with_what_would_fit():
    with pytest.raises(BadInput, match="max_new_tokens=3 or less") as refusal:
        check_length(5, 4, 8)
    assert refusal.value.fields["got"] == 9
