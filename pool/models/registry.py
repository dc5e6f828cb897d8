"""The models that a pool has loaded: found on disk, typed, and kept by name.

A model is a folder (one ONNX file, perhaps with `config.json` and `tokenizer.json`), an ONNX
file, or a folder of several that work together. This module must not place a model on a browser,
and reads no tensor.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from recovery import checks
from recovery.errors import BadInput, NotAModel, UnknownModel
from recovery.kinds import ModelType
from recovery.voting import Tolerance
from sharding.cutting.manager import ModelShardingManager
from sharding.models.signature import ModelFile, ModelSpec, read_signature
from sharding.sequences.stages import STAGE_MARK, StagePipeline

MODELS_MAX = 64  # in one pool
CONFIG_BYTES_MAX = 16 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# Families of models as regular expressions for a whole word; a version or size may follow it
# ("gpt2", "yolov8n", "resnet50").
_FAMILIES = {
    ModelType.MULTIMODAL: (
        "blip|clip|chineseclip|altclip|siglip|llava|llava[a-z]+|bakllava|moondream|paligemma|pix"
        "|idefics|smolvlm|florence|kosmos|fuyu|internvl|minicpmv|qwen[0-9_]*vl|donut|trocr|vilt|flava"
        "|owlvit|groundingdino|visionencoderdecoder|vl|vlm|multimodal"
    ),
    ModelType.VISION: (
        "vit|vit[bslgh]|deit|beit|dino|resnet|resnext|mobilenet|mobilevit|efficientnet|densenet"
        "|inception|vgg|squeezenet|shufflenet|convnext|regnet|swin|detr|rtdetr|yolo|yolos|ssd|rcnn"
        "|sam|unet|segformer|maskformer|dpt|midas|depth|ppocr|paddleocr|ocr|det|vision|image"
    ),
    ModelType.AUDIO: (
        "whisper|distilwhisper|wav2vec|hubert|wavlm|silero|vad|clap|speecht|speech|encodec|mimi"
        "|unispeech|seamless|moonshine|musicgen|bark|vits|asr|tts|audio|kokoro|parakeet"
    ),
    ModelType.TEXT: (
        "bert|distilbert|roberta|xlmroberta|albert|deberta|camembert|electra|mobilebert|tinybert"
        "|modernbert|squeezebert|minilm|mpnet|e|bge|gte|jina|nomic|t|mt|flant|bart|mbart|marian"
        "|pegasus|llama|tinyllama|codellama|vicuna|gpt|distilgpt|gptneo|gptneox|gptj|qwen|qwq|gemma"
        "|phi|mistral|mixtral|ministral|falcon|opt|bloom|olmo|granite|smollm|starcoder|deepseek"
        "|mamba|rwkv|xlm|xlnet|splade|colbert|llm|sentence|embedding"
    ),
}
# These are families only together with their number (T5, E5, ViT-B16): "e" alone is none.
_NUMBERED = frozenset({"e", "t", "mt", "flant", "speecht", "pix", "vit[bslgh]"})
# What a Hugging Face class says after "For", where its family is not known.
_TASKS = {
    ModelType.MULTIMODAL: "Vision2Seq|ImageTextToText|VisualQuestionAnswering",
    ModelType.VISION: "Image|ObjectDetection|SemanticSegmentation|DepthEstimation|Video",
    ModelType.AUDIO: "CTC|Audio|Speech|TextToSpeech",
    ModelType.TEXT: "CausalLM|MaskedLM|SequenceClassification|TokenClassification"
    "|QuestionAnswering|Seq2Seq",
}
_PATTERNS = {
    kind: re.compile(
        "|".join(
            rf"{family}v?\d\w*" if family in _NUMBERED else rf"{family}(?:v?\d\w*)?"
            for family in families.split("|")
        )
    )
    for kind, families in _FAMILIES.items()
}


def detect_model_type(name: str, config: Mapping[str, Any] | None = None) -> ModelType:
    """What kind of model this is, by its Hugging Face config if there is one, else by its name.

    Whole words decide: "vit-base" is vision, "vitamins" is not. Of two words in a name the
    first one counts, but a multimodal family comes before everything (LLaVA's own name is
    "llava-llama"), and so does "vision" beside a language model. `UNKNOWN` if nothing fits.
    """
    config = config or {}
    if "vision_config" in config and "text_config" in config:
        return ModelType.MULTIMODAL
    architectures = config.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    classes = [item for item in listed if isinstance(item, str)]
    model_type = config.get("model_type")
    words = [_class_family(item) for item in classes]
    if isinstance(model_type, str):
        words += [*_words(model_type), re.sub(r"[^a-z0-9]", "", model_type.lower())]
    found = _by_words(words)
    if found is ModelType.UNKNOWN:
        found = _by_task(classes)
    return _by_words(_words(name)) if found is ModelType.UNKNOWN else found


def _words(text: str) -> list[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    # Neighbours too, for families that are written as two words: "pp-ocrv4", "xlm-roberta".
    return words + ["".join(pair) for pair in itertools.pairwise(words)]


def _by_words(words: list[str]) -> ModelType:
    kinds = [
        kind for word in words for kind, pattern in _PATTERNS.items() if pattern.fullmatch(word)
    ]
    if ModelType.MULTIMODAL in kinds or ("vision" in words and ModelType.TEXT in kinds):
        return ModelType.MULTIMODAL
    return kinds[0] if kinds else ModelType.UNKNOWN


def _class_family(architecture: str) -> str:
    """The family in a class name: "bert" of BertForMaskedLM, "clip" of CLIPTextModel."""
    head = re.split(r"(?:Text|Vision|Audio)?(?:Model|LMHead|PreTrained|For[A-Z])", architecture)[0]
    return head.lower()


def _by_task(architectures: list[str]) -> ModelType:
    for kind, tasks in _TASKS.items():
        if any(re.search(rf"For(?:{tasks})", item) for item in architectures):
            return kind
    return ModelType.UNKNOWN


@dataclass(frozen=True)
class ModelEntry:
    """A model as the pool knows it: the graph's spec, and what lies beside the graph.

    `config` is the content of `config.json` (empty without one). `pipeline` are the stages of a
    decoder, or of a model that was cut, `components` the models that work together as this one:
    then these are what browsers load. `dictionary` is the file of a text reader's characters.
    `warnings` tell what its browsers do without, which is no error. Picklable.
    """

    spec: ModelSpec
    tokenizer_path: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    pipeline: StagePipeline | None = None
    components: tuple[ModelSpec, ...] = ()
    dictionary: ModelFile | None = None
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of what browsers load for it."""
        if self.components:
            return tuple(spec.name for spec in self.components)
        return (
            tuple(stage.model for stage in self.pipeline.stages) if self.pipeline else (self.name,)
        )

    @property
    def in_parts(self) -> bool:
        """Whether it is loaded as shards or components, so that no browser has all of it."""
        return self.parts != (self.name,)

    def component_entries(self) -> tuple[ModelEntry, ...]:
        """Each component as a model of its own, which can be asked by its own name."""
        return tuple(ModelEntry(spec, self.tokenizer_path, self.config) for spec in self.components)

    @property
    def positions_max(self) -> int | None:
        """How many tokens a sequence may have, prompt included; None: nothing is said of it."""
        limit = self.config.get("max_position_embeddings")
        return limit if type(limit) is int and limit > 0 else None


def entry_to_plain(entry: ModelEntry) -> dict[str, Any]:
    """An entry as JSON can carry it."""
    plain: dict[str, Any] = _ENTRY.dump_python(entry, mode="json")
    return plain


def entry_from_plain(plain: Mapping[str, Any]) -> ModelEntry:
    """The entry that `entry_to_plain` described."""
    return _ENTRY.validate_python(dict(plain))


_ENTRY = TypeAdapter(ModelEntry)


def read_model(
    name: str,
    path: str | Path,
    type: ModelType | str | None = None,  # noqa: A002
) -> ModelEntry:
    """The model at `path`, to be called `name`; `type` overrides what would be detected.

    `path` is an ONNX file or a folder. In a folder, and then in its `onnx` subfolder,
    `model.onnx` is taken, or else the only ONNX file there is in both. `tokenizer.json` and
    `config.json` are looked for beside the ONNX file, and above it if its folder is called
    `onnx`.

    Raises `BadInput` for the name or the type, `NotAModel` for what lies at the path.
    """
    check_name(name)
    given = None if type is None else model_type(type)
    graph = _find_graph(Path(path).absolute())
    folders = [graph.parent, *([graph.parent.parent] if graph.parent.name == "onnx" else [])]
    config = _read_config(folders)
    tokenizers = (folder / "tokenizer.json" for folder in folders)
    return ModelEntry(
        spec=read_signature(graph, name=name, type=given or _detect_from(name, graph, config)),
        tokenizer_path=next((file for file in tokenizers if file.is_file()), None),
        config=config,
    )


def read_components(
    name: str,
    path: str | Path,
    type: ModelType | str | None = None,  # noqa: A002
) -> ModelEntry:
    """The models in the folder at `path`, which work together, to be called `name`.

    Each becomes a component `name@ITS_NAME`; the whole has neither inputs nor outputs of its own.
    `type` overrides what would be detected, for all of them. Raises as `read_model`, and
    `NotAModel` as `ModelShardingManager.components`, or for a component's name.
    """
    check_name(name)
    given = None if type is None else model_type(type)
    folder = Path(path).absolute()
    found = ModelShardingManager(folder).component_specs()
    config = _read_config([folder])
    kind = given or detect_model_type(name, config)
    components = []
    for part, spec in found.items():
        if not _NAME.fullmatch(part):
            raise NotAModel(
                f"{folder}: {part!r} cannot name a component: expected 1 to 64 letters, digits, "
                "'.', '_' or '-', the first one a letter or digit. Rename the file.",
                path=str(folder),
                expected=_NAME.pattern,
                got=part,
            )
        own = given or detect_model_type(part)
        own = kind if own is ModelType.UNKNOWN else own
        components.append(replace(spec, name=f"{name}{STAGE_MARK}{part}", type=own))
    kinds = {spec.type for spec in components}
    if kind is ModelType.UNKNOWN and len(kinds) == 1:
        (kind,) = kinds
    tokenizer = folder / "tokenizer.json"
    content = "\n".join(f"{part} {spec.digest}" for part, spec in found.items())
    return ModelEntry(
        spec=ModelSpec(
            name=name,
            digest=hashlib.sha256(content.encode()).hexdigest(),
            type=kind,
            inputs=(),
            outputs=(),
            files=tuple(file for spec in components for file in spec.files),
            load_peak_bytes=max(spec.load_peak_bytes for spec in components),
            tolerance=Tolerance(),
            opset=max(spec.opset for spec in components),
        ),
        tokenizer_path=tokenizer if tokenizer.is_file() else None,
        config=config,
        components=tuple(components),
    )


def check_name(name: object) -> None:
    """Raises `BadInput` for what can't name a model."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadInput(
            f"{checks.shown(name)} cannot name a model: expected 1 to 64 letters, digits, '.', "
            "'_' or '-', the first one a letter or digit.",
            expected=_NAME.pattern,
            got=name,
        )


def model_type(given: str) -> ModelType:
    """The type that is called so. Raises `BadInput`."""
    try:
        return ModelType(given)
    except ValueError:
        raise BadInput(
            f"{checks.shown(given)} is no model type: expected one of {', '.join(ModelType)}.",
            expected=[str(kind) for kind in ModelType],
            got=given,
        ) from None


def _detect_from(name: str, graph: Path, config: Mapping[str, Any]) -> ModelType:
    found = detect_model_type(name, config)
    # The name is the user's choice and may say nothing; the file's own often does.
    return detect_model_type(graph.stem) if found is ModelType.UNKNOWN else found


def _find_graph(path: Path) -> Path:
    if not path.is_dir():
        return path
    candidates = [
        file
        for folder in (path, path / "onnx")
        for file in sorted(folder.glob("*.onnx"))
        if file.is_file()
    ]
    preferred = [file for file in candidates if file.name == "model.onnx"]
    if preferred:
        return preferred[0]
    if len(candidates) == 1:
        return candidates[0]
    found = [str(file.relative_to(path)) for file in candidates]
    raise NotAModel(
        f"{path}: expected a folder with model.onnx or exactly one .onnx file, "
        f"got {', '.join(found) or 'none'}"
        + (" (give the path of the one that you mean)." if found else "."),
        path=str(path),
        expected="model.onnx, or exactly one .onnx file",
        got=found,
    )


def _read_config(folders: list[Path]) -> dict[str, Any]:
    file = next((f for folder in folders if (f := folder / "config.json").is_file()), None)
    if file is None:
        return {}
    try:
        if file.stat().st_size > CONFIG_BYTES_MAX:
            raise ValueError(f"it is larger than {CONFIG_BYTES_MAX:,} bytes")
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise NotAModel(
            f"{file}: expected the model's configuration as JSON, got: {error}.",
            path=str(file),
            expected="JSON",
            got=str(error),
        ) from error
    if not isinstance(config, dict):
        raise NotAModel(
            f"{file}: expected a JSON object, got {config.__class__.__name__}.",
            path=str(file),
            expected="a JSON object",
            got=config.__class__.__name__,
        )
    return config


class ModelRegistry:
    """The loaded models by name. Belongs to one owner; it does not lock."""

    def __init__(self, models_max: int = MODELS_MAX) -> None:
        self._models_max = models_max
        self._entries: dict[str, ModelEntry] = {}

    def __repr__(self) -> str:
        return f"<ModelRegistry [{', '.join(self._entries) or 'empty'}]>"

    def add(self, entry: ModelEntry) -> None:
        """Keeps the entry under its name. The same content again replaces its entry.

        Raises `BadInput` if another model has the name, or `models_max` models are there.
        """
        known = self._entries.get(entry.name)
        if known is not None and known.spec.digest != entry.spec.digest:
            raise BadInput(
                f"Model {entry.name!r} is loaded with other content (digest "
                f"{known.spec.digest[:12]}, not {entry.spec.digest[:12]}): unload it first, or "
                "choose another name.",
                expected=known.spec.digest,
                got=entry.spec.digest,
            )
        if known is None and len(self._entries) >= self._models_max:
            raise BadInput(
                f"A pool holds at most {self._models_max} models: unload one before "
                f"{entry.name!r} is loaded.",
                expected=f"at most {self._models_max}",
                got=self._models_max + 1,
            )
        self._entries[entry.name] = entry

    def get(self, name: str) -> ModelEntry:
        """Raises `UnknownModel`, naming what is loaded."""
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise self._unknown(name) from None

    def remove(self, name: str) -> ModelEntry:
        """Raises `UnknownModel`, naming what is loaded."""
        entry = self.get(name)
        del self._entries[name]
        return entry

    def names(self) -> tuple[str, ...]:
        """In the order of loading."""
        return tuple(self._entries)

    def _unknown(self, name: str) -> UnknownModel:
        loaded = ", ".join(self._entries) or "none"
        return UnknownModel(
            f"No model {checks.shown(name)} is loaded; loaded: {loaded}.",
            expected=list(self._entries),
            got=name,
        )
