"""What a page may fetch: the page's own files, onnxruntime-web, and registered model files.

Every servable file is in a table made beforehand, looked up by its whole path; no request path
is ever joined to a directory, so none can escape one. This module must not open sockets.
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from recovery.errors import SetupError
from sharding.models.signature import ModelFile, ModelSpec

MODELS = "/models/"  # what the request paths of models' files begin with

_PAGE = Path(__file__).with_name("page")
_ORT = _PAGE / "ort"
_TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}

# The page changes with tabpool; onnxruntime-web's files have their version in the path; a model
# is fetched once per browser life, and caching it would only fill the profile.
_REVALIDATE = "no-cache"
_FOREVER = "public, max-age=31536000, immutable"
_NEVER = "no-store"


@dataclass(frozen=True)
class Asset:
    path: Path
    content_type: str
    cache_control: str


@cache
def ort_version() -> str:
    """The version of onnxruntime-web that is served. Raises `SetupError` if it is not there."""
    try:
        return (_ORT / "VERSION").read_text().strip()
    except FileNotFoundError as error:
        raise SetupError(
            "onnxruntime-web's files are not beside the page. In a checkout run `make setup`; "
            "an installed wheel always has them, so reinstall tabpool."
        ) from error


@cache
def static_assets() -> Mapping[str, Asset]:
    """The table of page and runtime files, by request path."""
    table = {
        f"/page/{path.name}": _asset(path, _REVALIDATE)
        for path in sorted(_PAGE.iterdir())
        if path.suffix in (".js", ".onnx")
    }
    prefix = f"/ort/{ort_version()}"
    for path in sorted(_ORT.iterdir()):
        if path.suffix in (".mjs", ".wasm"):
            table[f"{prefix}/{path.name}"] = _asset(path, _FOREVER)
    return table


def index_html() -> str:
    return (_PAGE / "index.html").read_text(encoding="utf-8")


def model_assets(spec: ModelSpec) -> Mapping[str, Asset]:
    """The table of one model's files, by request path (its graph first)."""
    return {
        model_url(spec, number): Asset(Path(file.path), "application/octet-stream", _NEVER)
        for number, file in enumerate(spec.files)
    }


def model_url(spec: ModelSpec, number: int) -> str:
    """Request path of a model's file: by content, so that a name can't be confused."""
    return f"{MODELS}{spec.digest}/{number}"


def integrity(file: ModelFile) -> str:
    """What a browser compares the file's bytes with as it fetches them (W3C's SRI)."""
    return f"sha256-{base64.b64encode(bytes.fromhex(file.digest)).decode()}"


def _asset(path: Path, cache_control: str) -> Asset:
    guessed = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
    return Asset(path, guessed or "application/octet-stream", cache_control)
