import json
import pickle

import pytest

from pool.models.registry import ModelRegistry, detect_model_type, read_model
from recovery.errors import BadInput, NotAModel, UnknownModel
from recovery.kinds import ModelType
from tests import models


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            ModelType.TEXT,
            (
                "all-MiniLM-L6-v2 bert-base-uncased t5-small flan-t5 tiny-llama TinyLlama llama3 "
                "gpt2 Qwen2.5-0.5B gemma-2b phi3 e5-large bge-m3 xlm-roberta mistral-7b mpnet-v2"
            ),
        ),
        (
            ModelType.VISION,
            (
                "vit-base ViT-B/16 dinov2_vits14 resnet50 mobilenetv2 detr yolov8n swin "
                "convnext-tiny sam ch_PP-OCRv4_det_infer ch_PP-OCRv4_rec_infer paddleocr"
            ),
        ),
        (
            ModelType.AUDIO,
            "whisper-tiny wav2vec2-base hubert silero_vad_v5 clap-htsat speecht5 my.vad",
        ),
        (
            ModelType.MULTIMODAL,
            "clip-vit-base llava-llama llava blip2 siglip-so llama-3.2-vision Qwen2-VL pix2struct",
        ),
        (
            ModelType.UNKNOWN,
            "vitamins clipper detail samples evade robert model part-5 e t foo classifier 123 -",
        ),
    ],
)
def test_the_type_is_read_from_a_name(kind, names):
    assert {name: detect_model_type(name) for name in names.split()} == dict.fromkeys(
        names.split(), kind
    )


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (ModelType.TEXT, {"model_type": "bert"}),
        (ModelType.TEXT, {"architectures": ["BertForMaskedLM"]}),
        (ModelType.TEXT, {"architectures": ["GPT2LMHeadModel"]}),
        (ModelType.TEXT, {"architectures": ["NewForCausalLM"], "model_type": "new"}),
        (ModelType.VISION, {"architectures": ["ViTForImageClassification"]}),
        (ModelType.VISION, {"architectures": ["NewForImageClassification"]}),
        (ModelType.AUDIO, {"architectures": ["Wav2Vec2ForCTC"]}),
        (ModelType.AUDIO, {"architectures": ["ASTForAudioClassification"]}),
        (ModelType.MULTIMODAL, {"architectures": ["CLIPTextModel"]}),
        (ModelType.MULTIMODAL, {"architectures": ["LlavaLlamaForCausalLM"]}),
        (ModelType.MULTIMODAL, {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}),
        (ModelType.MULTIMODAL, {"model_type": "vision-encoder-decoder"}),
        (ModelType.MULTIMODAL, {"model_type": "gemma3", "vision_config": {}, "text_config": {}}),
    ],
)
def test_the_config_decides_before_the_name(kind, config):
    other = "whisper" if kind is ModelType.TEXT else "bert"
    assert detect_model_type(other, config) is kind


@pytest.mark.parametrize(
    "config",
    [{}, None, {"model_type": 3, "architectures": [1, None]}, {"architectures": "BertModel"}],
)
def test_a_config_that_says_nothing_leaves_it_to_the_name(config):
    assert detect_model_type("resnet", config) is ModelType.VISION


def test_reads_a_file_and_what_lies_beside_it(tmp_path):
    path = models.add_model(tmp_path / "resnet18.onnx")
    entry = read_model("mine", path)
    assert entry.name == entry.spec.name == "mine"
    assert entry.spec.type is ModelType.VISION  # from the file's name, as the given says nothing
    assert entry.tokenizer_path is None
    assert entry.config == {}

    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    entry = read_model("mine", str(path))
    assert entry.tokenizer_path == tmp_path / "tokenizer.json"
    assert entry.spec.type is ModelType.TEXT
    assert read_model("mine", path, "audio").spec.type is ModelType.AUDIO
    assert pickle.loads(pickle.dumps(entry)) == entry


def test_reads_a_folder_with_an_onnx_subfolder(tmp_path):
    path = models.add_model(tmp_path / "onnx" / "model.onnx")
    models.add_model(tmp_path / "onnx" / "model_quantized.onnx")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for given in (tmp_path, path):
        entry = read_model("m", given)
        assert entry.spec.files[0].path == str(path)
        assert entry.config == {"model_type": "bert"}


def test_a_folder_needs_one_candidate_or_a_model_onnx(tmp_path):
    with pytest.raises(NotAModel, match="got none"):
        read_model("m", tmp_path)
    b = models.add_model(tmp_path / "b.onnx")
    assert read_model("m", tmp_path).spec.files[0].path == str(b)
    models.add_model(tmp_path / "a.onnx")
    with pytest.raises(NotAModel, match=r"a\.onnx, b\.onnx") as caught:
        read_model("m", tmp_path)
    assert caught.value.fields["got"] == ["a.onnx", "b.onnx"]
    path = models.add_model(tmp_path / "model.onnx")
    assert read_model("m", tmp_path).spec.files[0].path == str(path)


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "a\n", "ä", "a" * 65])
def test_names_that_would_break_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(BadInput, match="cannot name a model"):
        read_model(name, models.add_model(tmp_path / "m.onnx"))


def test_an_unknown_type_and_a_missing_path_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no model type"):
        read_model("m", models.add_model(tmp_path / "m.onnx"), "smell")
    with pytest.raises(NotAModel, match="No such file"):
        read_model("m", tmp_path / "none")


@pytest.mark.parametrize("content", ["{", "[]", "\x00", '{"a":' * 100_000])
def test_a_broken_config_is_named(tmp_path, content):
    path = models.add_model(tmp_path / "m.onnx")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(NotAModel, match=r"config\.json"):
        read_model("m", path)


def test_registry_keeps_models_by_name(tmp_path):
    registry = ModelRegistry(models_max=2)
    with pytest.raises(UnknownModel, match="loaded: none"):
        registry.get("a")
    one = read_model("a", models.add_model(tmp_path / "1.onnx"))
    other = read_model("a", models.add_model(tmp_path / "2.onnx", amount=2.0))
    registry.add(one)
    registry.add(one)
    assert registry.get("a") == one
    with pytest.raises(BadInput, match="unload it first"):
        registry.add(other)
    assert registry.get("a") == one
    registry.add(read_model("b", tmp_path / "1.onnx"))
    with pytest.raises(BadInput, match="at most 2"):
        registry.add(read_model("c", tmp_path / "1.onnx"))
    registry.add(one)  # which is there already, so it needs no room
    assert registry.names() == ("a", "b")
    assert repr(registry) == "<ModelRegistry [a, b]>"
    with pytest.raises(UnknownModel, match="'c' is loaded; loaded: a, b"):
        registry.remove("c")
    assert registry.remove("a") == one
    registry.add(other)
    assert json.loads(json.dumps(registry.names())) == ["b", "a"]
