"""Makes the models in this folder: real exports of tiny ones, decoders and a BERT, with random
weights.

Two environments, since the two exporters need different versions of transformers:

    python3.11 -m venv b && b/bin/pip install torch==2.13.0 onnxruntime-genai==0.18.0 \
        transformers==5.24.0 onnxruntime onnx onnx-ir
    b/bin/python make.py builder
    python3.11 -m venv o && o/bin/pip install torch==2.13.0 optimum-onnx==0.1.0 \
        transformers==4.57.6 onnxruntime onnx
    o/bin/python make.py optimum

Names on the command line after that make only these. No test needs this script.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import torch
import transformers
from tokenizers import Tokenizer, models

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 80,  # no other size: the builder takes any layer that wide for the head
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}
ARCHITECTURES = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**GEMMA, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", {"sliding_window": None, "original_max_position_embeddings": 64}),
    # Past 32 tokens another rotary table is used; an If chooses it.
    "phi3-long": (
        "Phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 32,
            "rope_scaling": {
                "type": "longrope",
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    # One head, since rotary tables must be 8 wide at least, and here they are a quarter of it.
    "phi": ("Phi", {"num_attention_heads": 1, "partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2", {}),
    "bert": ("Bert", {}),
}
BUILDER = {
    "llama": ("llama", "fp32", ()),
    "llama-tied": ("llama-tied", "fp32", ("shared_embeddings=true",)),
    "llama-int4": ("llama", "int4", ()),
    "llama-tied-int4": ("llama-tied", "int4", ("shared_embeddings=true",)),
    "qwen2": ("qwen2", "fp32", ()),
    "gemma2": ("gemma2", "fp32", ()),
    "phi3": ("phi3", "fp32", ()),
    "phi3-long": ("phi3-long", "fp32", ()),
    "phi": ("phi", "fp32", ()),
    "phi-int4": ("phi", "int4", ()),
    "llama-hidden": ("llama", "fp32", ("include_hidden_states=true",)),
    "llama-embeds": ("llama", "fp32", ("exclude_embeds=true",)),
    # For DirectML the rotation stands before the attention and takes position_ids; float16.
    "llama-positions": ("llama", "fp16", ()),
}
OPTIMUM = ("llama", "qwen2", "gemma2", "phi3", "phi", "gpt2", "bert", "bert-int8")


def save_checkpoint(architecture: str, folder: Path, **smaller: int) -> None:
    """A model with random weights and a tokenizer, as transformers saves them."""
    kind, options = ARCHITECTURES[architecture]
    sizes = {**SIZES, **smaller}
    if kind == "GPT2":
        names = {"n_embd": "hidden_size", "n_inner": "intermediate_size"}
        names |= {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
        names |= {"n_positions": "max_position_embeddings", "vocab_size": "vocab_size"}
        sizes = {name: sizes[its] for name, its in names.items()}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    head = {"GPT2": "LMHeadModel", "Bert": "Model"}.get(kind, "ForCausalLM")
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Transformers' own start leaves the logits almost equal, and norms and biases idle.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    vocabulary = {f"t{i}": i for i in range(SIZES["vocab_size"])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")),
        bos_token="t1",
        eos_token="t2",
        pad_token="t0",
        unk_token="t0",
    )
    tokenizer.save_pretrained(folder)


def builder(name: str, work: Path) -> Path:
    architecture, precision, extra = BUILDER[name]
    save_checkpoint(architecture, work / "checkpoint")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(work / "checkpoint"), "-o", str(work / "out"), "-p", precision]
    command += ["-e", "dml" if precision == "fp16" else "cpu", "-c", str(work / "cache")]
    if extra:
        command += ["--extra_options", *extra]
    subprocess.run(command, check=True)
    return work / "out" / "model.onnx"


def optimum(name: str, work: Path) -> Path:
    from optimum.exporters.onnx import main_export

    # Its graphs are large, and its attention takes heads of any size.
    name, _, quantized = name.partition("-")
    save_checkpoint(name, work / "checkpoint", hidden_size=16, intermediate_size=32)
    main_export(
        str(work / "checkpoint"),
        str(work / "out"),
        task="feature-extraction" if name == "bert" else "text-generation-with-past",
        opset=14 if name == "bert" else None,  # before 17 a layer norm is nine nodes
        do_validation=False,
    )
    made = work / "out" / "model.onnx"
    if quantized:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(made, made.with_name("int8.onnx"), weight_type=QuantType.QInt8)
        return made.with_name("int8.onnx")
    return made


def main() -> None:
    exporter, *names = sys.argv[1:]
    make = {"builder": builder, "optimum": optimum}[exporter]
    for name in names or {"builder": BUILDER, "optimum": OPTIMUM}[exporter]:
        with tempfile.TemporaryDirectory() as work:
            try:
                made = make(name, Path(work))
            except Exception as error:
                sys.stdout.write(f"{exporter}-{name}: {type(error).__name__}: {error}\n")
                continue
            model = onnx.load(made)  # with its weights, which then lie in one file
            for node in model.graph.node:
                node.doc_string = ""
                del node.metadata_props[:]
            for value in model.graph.value_info:
                del value.metadata_props[:]
            target = HERE / f"{exporter}-{name}.onnx"
            onnx.save(model, target)
            sys.stdout.write(f"{target.name}: {target.stat().st_size:,} bytes\n")
            shutil.rmtree(Path(work) / "out")


if __name__ == "__main__":
    main()
