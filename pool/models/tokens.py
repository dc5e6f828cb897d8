"""Text to token ids, with the tokenizer that the model's folder brings.

The only door to `tokenizers`. This module must not know what an operation does with the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.decoders import DecodeStream

from pool.models.registry import ModelEntry
from recovery.bounded_files import read_bounded
from recovery.errors import BadInput, NotAModel
from sharding.models.frames import Array
from sharding.models.signature import TensorSpec

TEXTS_MAX = 1024  # in one batch
TEXT_CHARACTERS_MAX = 1_000_000  # in one text
TOKENIZER_BYTES_MAX = 128 << 20  # of its file: a large vocabulary's has 40 MB

_PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>")
# Their positions begin after the padding token's id, which takes that many from the limit.
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"})


class TextEncoder:
    """The tokenizer in one `tokenizer.json`, opened when it is first needed.

    `length_max` (tokens, special ones included) lowers the file's own truncation; `length`
    fixes the length instead, for graphs that take no other; `pad_id` is used if the file does
    not name one.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        length_max: int | None = None,
        length: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        self._path = Path(path)
        self._length_max = length_max
        self._length = length
        self._pad_id = pad_id
        self._pad_left = False
        self._tokenizer: tokenizers.Tokenizer | None = None

    def __repr__(self) -> str:
        state = "closed" if self._tokenizer is None else "open"
        return f"<TextEncoder {self._path} {state}>"

    def encode(self, texts: str | Sequence[str], inputs: Sequence[TensorSpec]) -> dict[str, Array]:
        """Those of `input_ids`, `attention_mask` and `token_type_ids` that `inputs` has.

        Each of shape (batch, tokens), with the dtype that `inputs` gives for it; one string is
        a batch of one. Padded to the longest text of the batch (mask 0), truncated to the limit.

        Raises `BadInput` for an empty batch, more than `TEXTS_MAX` texts, a text that is no
        string, is longer than `TEXT_CHARACTERS_MAX` or holds half a surrogate pair, and a batch
        without a single token; `NotAModel` if the file is no tokenizer.
        """
        batch = _check_texts(texts)
        tokenizer = self._open()
        encodings = tokenizer.encode_batch(batch)
        longest = max(len(encoding.ids) for encoding in encodings)
        width = self._length or longest
        if longest > width:  # the tokenizer's special tokens alone are more than that
            raise BadInput(
                f"The model takes {width} tokens, and no text is that short.",
                expected=f"at most {width} tokens",
                got=longest,
            )
        if longest == 0:
            raise BadInput(
                "The texts hold no token at all.", expected="text with a token", got=batch[:3]
            )
        pad_id = self._pad_id or 0
        columns = {
            "input_ids": (pad_id, [encoding.ids for encoding in encodings]),
            "attention_mask": (0, [encoding.attention_mask for encoding in encodings]),
            "token_type_ids": (0, [encoding.type_ids for encoding in encodings]),
        }
        arrays = {}
        for tensor in inputs:
            if tensor.name in columns:
                fill, rows = columns[tensor.name]
                array = np.full((len(batch), width), fill, np.dtype(tensor.dtype))
                for row, values in enumerate(rows):
                    start = width - len(values) if self._pad_left else 0
                    array[row, start : start + len(values)] = values
                arrays[tensor.name] = array
        return arrays

    def ids(self, text: str) -> list[int]:
        """The token ids of one text, with the special tokens that the file adds; not truncated.

        Raises `BadInput` as `encode` does.
        """
        (checked,) = _check_texts(text)
        tokenizer = self._open()
        limit = tokenizer.truncation
        tokenizer.no_truncation()  # a prompt that is too long is refused, not cut short
        try:
            return list(tokenizer.encode(checked).ids)
        finally:
            if limit is not None:
                tokenizer.enable_truncation(**limit)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._open().decode(list(ids), skip_special_tokens=True)

    def pieces(self) -> Callable[[int], str]:
        """Of a text that comes token by token: what each adds to it, "" in mid-character."""
        tokenizer, stream = self._open(), DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(tokenizer, token) or ""

    def _open(self) -> tokenizers.Tokenizer:
        if self._tokenizer is not None:
            return self._tokenizer
        try:
            content = read_bounded(self._path, TOKENIZER_BYTES_MAX, error=NotAModel)
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
            self._configure(tokenizer)
        except Exception as error:  # the library raises nothing narrower
            raise NotAModel(
                f"{self._path}: expected a tokenizer.json that fits the model, got: {error}",
                path=str(self._path),
                expected="a tokenizer.json",
                got=str(error),
            ) from error
        self._tokenizer = tokenizer
        return tokenizer

    def _configure(self, tokenizer: tokenizers.Tokenizer) -> None:
        padding = tokenizer.padding
        if padding is not None:
            self._pad_id = padding["pad_id"]
            self._pad_left = padding["direction"] == "left"
        elif self._pad_id is None:
            known = (tokenizer.token_to_id(token) for token in _PAD_TOKENS)
            self._pad_id = next((token for token in known if token is not None), 0)
        tokenizer.no_padding()  # files often fix 128; padding to the longest is ours to do
        own = tokenizer.truncation or {}
        limits = [own.get("max_length"), self._length_max, self._length]
        limit = min((value for value in limits if value is not None), default=None)
        if limit is not None:
            tokenizer.enable_truncation(
                limit,
                strategy=own.get("strategy", "longest_first"),
                direction=own.get("direction", "right"),
            )


def encoder_for(entry: ModelEntry) -> TextEncoder | None:
    """The encoder for a model with a `tokenizer.json`, with the model's own limits."""
    if entry.tokenizer_path is None:
        return None
    ids = next((tensor for tensor in entry.spec.inputs if tensor.name == "input_ids"), None)
    fixed = ids.shape[-1] if ids is not None and ids.shape else None
    return TextEncoder(
        entry.tokenizer_path,
        length_max=_positions_max(entry.config),
        length=fixed if isinstance(fixed, int) else None,
        pad_id=_integer(entry.config.get("pad_token_id")),
    )


def _positions_max(config: Mapping[str, Any]) -> int | None:
    """The most tokens that the model has positions for."""
    limit = _integer(config.get("max_position_embeddings"))
    if limit is not None and config.get("model_type") in _OFFSET_POSITIONS:
        pad = _integer(config.get("pad_token_id"))
        limit -= (1 if pad is None else pad) + 1
    return limit if limit is not None and limit > 0 else None


def _integer(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _check_texts(texts: str | Sequence[str]) -> list[str]:
    batch = [texts] if isinstance(texts, str) else texts
    if not isinstance(batch, list | tuple):
        raise BadInput(
            f"Text must be a string or a list of strings, not {type(texts).__name__}.",
            expected="a string or a list of strings",
            got=type(texts).__name__,
        )
    if not 1 <= len(batch) <= TEXTS_MAX:
        raise BadInput(
            f"A batch has 1 to {TEXTS_MAX} texts, not {len(batch)}.",
            expected=f"1 to {TEXTS_MAX} texts",
            got=len(batch),
        )
    for index, text in enumerate(batch):
        if not isinstance(text, str):
            raise BadInput(
                f"Text {index} must be a string, not {type(text).__name__}.",
                expected="a string",
                got=type(text).__name__,
            )
        if len(text) > TEXT_CHARACTERS_MAX:
            raise BadInput(
                f"Text {index} has {len(text):,} characters, the limit is {TEXT_CHARACTERS_MAX:,}.",
                expected=f"at most {TEXT_CHARACTERS_MAX} characters",
                got=len(text),
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(
                f"Text {index} is not valid Unicode: {error}.", expected="Unicode", got=str(error)
            ) from error
    return list(batch)
