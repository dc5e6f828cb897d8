"""Turns a checkpoint of `train.py` into what tabpool ships: ONNX in fp32 and int4, tokenizer and
config; and what Hugging Face transformers makes of a few prompts, for tests to compare with.

    env/bin/python export.py checkpoint --out ../../pool/assets

makes `kjv-llama/` and `kjv-llama-int4/` there, each a folder that `pool.load` takes, and
`kjv-llama-reference.npz` in the tests' assets. onnxruntime-genai's builder writes the graphs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

REFERENCE = Path(__file__).parents[2] / "tests" / "assets" / "kjv-llama-reference.npz"
PROMPTS = ("And the LORD said", "In the beginning", "Blessed are they that")
NEW = 24
VARIANTS = {"kjv-llama": ("fp32", ()), "kjv-llama-int4": ("int4", ("shared_embeddings=true",))}


def build(checkpoint: Path, precision: str, extra: tuple[str, ...], work: Path) -> Path:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(checkpoint), "-o", str(work / "out"), "-p", precision]
    command += ["-e", "cpu", "-c", str(work / "cache")]
    if extra:
        command += ["--extra_options", *extra]
    subprocess.run(command, check=True)
    return work / "out"


def export(checkpoint: Path, name: str, out: Path) -> None:
    precision, extra = VARIANTS[name]
    target = out / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work:
        made = build(checkpoint, precision, extra, Path(work))
        model = onnx.load(made / "model.onnx")  # with its weights
        for node in model.graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
        for value in model.graph.value_info:
            del value.metadata_props[:]
        onnx.save(
            model,
            target / "model.onnx",
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=1024,
        )
    shutil.copy(checkpoint / "tokenizer.json", target)
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("transformers_version", None)
    (target / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    size = sum(file.stat().st_size for file in target.iterdir())
    sys.stdout.write(f"{target}: {size:,} bytes\n")


@torch.no_grad()
def reference(checkpoint: Path) -> None:
    """Greedy tokens and each step's logits, by transformers, for every prompt."""
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    found: dict[str, np.ndarray] = {"prompts": np.asarray(PROMPTS)}
    for number, prompt in enumerate(PROMPTS):
        ids = [1, *tokenizer(prompt)["input_ids"]]
        rows, tokens, past, step = [], [], None, torch.tensor([ids])
        for _ in range(NEW):
            answer = model(input_ids=step, past_key_values=past, use_cache=True)
            past = answer.past_key_values
            rows.append(answer.logits[0, -1].numpy())
            tokens.append(int(rows[-1].argmax()))
            step = torch.tensor([[tokens[-1]]])
        found |= {f"ids_{number}": np.asarray(ids), f"tokens_{number}": np.asarray(tokens)}
        # Every eighth score is enough to tell, and keeps the file small.
        found[f"logits_{number}"] = np.stack(rows)[:, ::8].astype(np.float32)
        sys.stdout.write(f"{prompt}{tokenizer.decode(tokens)}\n")
    np.savez_compressed(REFERENCE, **found)
    sys.stdout.write(f"{REFERENCE}: {REFERENCE.stat().st_size:,} bytes\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="what `train.py --out` made")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    args = parser.parse_args()
    for name in VARIANTS:
        export(args.checkpoint, name, args.out)
    reference(args.checkpoint)


if __name__ == "__main__":
    main()
