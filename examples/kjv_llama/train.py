"""Trains the small llama that tabpool ships, from nothing but a public-domain text.

The text is the King James Bible (1611, its copyright expired) as Debian's package `bible-kjv-text`
prints it. The model is an ordinary LlamaForCausalLM of 3.5 million parameters. On 2 cores the
tokenizer takes seconds and 4,000 steps take about an hour. What is made lies in `--out`:
a checkpoint as transformers saves it, with its tokenizer, which `export.py` turns into ONNX.

    python3.11 -m venv env && env/bin/pip install -r requirements.txt
    apt-get download bible-kjv bible-kjv-text && for d in *.deb; do dpkg -x $d bible; done
    bible/usr/bin/bible -p bible/usr/lib -f -l2000 Gen1:1-Rev22:21 > kjv.txt
    env/bin/python train.py kjv.txt --out checkpoint
    env/bin/python export.py checkpoint --out DIR
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>")  # 0, 1, 2
VOCABULARY = 2048
CONTEXT = 256
BATCH = 6
PEAK_RATE, LAST_RATE, WARM_UP = 2e-3, 1e-4, 100
SEED = 20

_VERSE = re.compile(r"^(\S+?)(\d+):(\d+) (.*)$")


def chapters(printed: str) -> list[str]:
    """The text of each chapter, its verses joined by spaces and without their numbers."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in printed.splitlines():
        if verse := _VERSE.match(line):
            book, chapter, _, text = verse.groups()
            found.setdefault((book, chapter), []).append(" ".join(text.split()))
    return [" ".join(verses) for verses in found.values()]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be written with it, and every token turned back."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    pad, first, last = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=pad, bos_token=first, eos_token=last
    )


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def rate(step: int, steps: int) -> float:
    """The learning rate: up in a line, down in half a cosine."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    part = (step - WARM_UP) / max(1, steps - WARM_UP)
    return LAST_RATE + (PEAK_RATE - LAST_RATE) * (1 + math.cos(math.pi * part)) / 2


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int) -> None:
    """Next-token prediction on windows of `CONTEXT` tokens at random places of `tokens` (1-D)."""
    kept_out = tokens[-len(tokens) // 50 :]  # the last fiftieth, to see what it learns in general
    tokens = tokens[: -len(kept_out)]
    chance = torch.Generator().manual_seed(SEED)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=chance)
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            took = time.monotonic() - began
            left = took / (step + 1) * (steps - step - 1)
            sys.stderr.write(
                f"\rstep {step + 1}/{steps}, loss {loss.item():.3f}, {left / 60:.0f} min left   "
            )
        if step % 500 == 499 or step == steps - 1:
            sys.stderr.write(f"\nloss on what was kept out: {general_loss(model, kept_out):.3f}\n")


@torch.no_grad()
def general_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return float(model(input_ids=windows, labels=windows).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="what `bible -f -l2000 Gen1:1-Rev22:21` printed")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=4000, help="steps of training (default 4000)")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    texts = chapters(args.text.read_text())
    if not texts:
        parser.error(f"{args.text} holds no verses, such as 'Ge1:1 In the beginning ...'")
    tokenizer = make_tokenizer(texts)
    # A chapter is a document: <s> text </s>.
    ids = [[1, *tokenizer(text)["input_ids"], 2] for text in texts]
    tokens = torch.tensor([token for chapter in ids for token in chapter])
    model = make_model()
    sys.stderr.write(
        f"{len(texts)} chapters, {len(tokens):,} tokens, {model.num_parameters():,} parameters\n"
    )
    train(model, tokens, args.steps)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
