"""The page's own encoder and decoder, run by node, against ours."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharding.models.frames import HEADER_BYTES_MAX, TENSORS_MAX, Frame, decode, encode

FRAMES = Path(__file__).parents[2] / "actors" / "page" / "frames.js"
LIMIT = 1 << 24
_SCRIPT = """
import { readFileSync, writeSync } from "node:fs";
const { decode, encode } = await import(process.argv[1]);
const order = JSON.parse(readFileSync(0));
if (order.frame) {
  const { buffer, byteOffset, byteLength } = Buffer.from(order.frame, "base64");
  writeSync(1, encode(decode(buffer.slice(byteOffset, byteOffset + byteLength))));
} else {
  const tensors = {};
  for (let n = 0; n < order.count; n++) {
    tensors[order.name.replace("#", n)] = { type: "float32", data: new Float32Array(1), dims: [1] };
  }
  try {
    writeSync(1, encode({ kind: "result", op: "op", tensors }));
  } catch (error) {
    writeSync(1, Buffer.from(`refused: ${error.message}`));
  }
}
"""


def page(order: dict[str, Any]) -> bytes:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    command = [node, "--input-type=module", "-e", _SCRIPT, FRAMES.as_uri()]
    run = subprocess.run(command, input=json.dumps(order).encode(), capture_output=True, check=True)
    return run.stdout


@pytest.mark.parametrize(
    ("count", "name", "why"),
    [
        (TENSORS_MAX + 1, "y#", f"{TENSORS_MAX + 1} outputs, and a message carries at most"),
        (2, "#" + "y" * (HEADER_BYTES_MAX // 2), "and a message has at most"),
        (1, "__metadata__", "can't be called __metadata__"),
    ],
)
def test_page_refuses_an_answer_that_we_would_not_take(count, name, why):
    said = page({"count": count, "name": name}).decode()
    assert said.startswith("refused: ")
    assert why in said


def test_page_sends_what_we_would_just_take():
    frame = decode(page({"count": TENSORS_MAX, "name": "y#"}), bytes_max=LIMIT)
    assert len(frame.tensors) == TENSORS_MAX
    long = "y" * (HEADER_BYTES_MAX - 4096)
    assert list(decode(page({"count": 1, "name": long}), bytes_max=LIMIT).tensors) == [long]


def test_frame_is_the_same_on_both_sides():
    tensors = {
        "halves": np.array([1.5, -2], np.float16),
        "long": np.array([[2**62, -1]], np.int64),
        "flag": np.array(True),
        "none": np.zeros((0, 3), np.float32),
        "é": np.arange(3, dtype=np.uint8),
    }
    sent = Frame("run", "op ü", 3, 4, 5, {"a": [1, "x"]}, tensors)
    order = {"frame": base64.b64encode(encode(sent, bytes_max=LIMIT)).decode()}
    back = decode(page(order), bytes_max=LIMIT)
    assert (back.kind, back.op_id, back.epoch, back.step, back.position) == ("run", "op ü", 3, 4, 5)
    assert back.body == sent.body
    assert back.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        if name != "halves":  # older engines have no type for them: bits
            assert back.tensors[name].dtype == array.dtype
        assert back.tensors[name].tobytes() == array.tobytes()
