"""Sharded models as files on this disk: cut by layer, or taken by component.

A model is cut once: a folder with the same cut of the same model, undamaged, is reused. Several
models that work together (encoder and decoder, detector and recogniser) need no cutting: each is a
component, loaded as it is. This module must not decide where to cut
(`sharding.cutting.partition` does) and must not load anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from recovery.errors import BadInput, NotAModel
from sharding.cutting.analyzer import Measurement, ModelShardingAnalyzer
from sharding.cutting.cut import cut
from sharding.cutting.manifest import MANIFEST_NAME, Manifest, read_manifest
from sharding.cutting.spans import Host, Partition
from sharding.cutting.strategies import STRATEGIES as LAYER_STRATEGIES
from sharding.models.signature import ModelSpec, read_signature

COMPONENT_BASED = "component_based"
DEFAULT_STRATEGY = "layer_based"
STRATEGIES = (*LAYER_STRATEGIES, COMPONENT_BASED)
COMPONENTS_MAX = 64

_FIRST_SHARD = "shard-0.onnx"  # what `cut` writes, whatever the manifest beside it says
_PREFERRED = "model.onnx"
_ONNX_FOLDER = "onnx"  # where exporters for browsers put the graphs


class ModelShardingManager:
    """The shards of the ONNX file at `path`, or the components in the folder at `path`.

    `out_dir` is where shards are written: by default `<model>.shards`, beside the model. Only one
    process at a time may cut into a folder. Calls block.
    """

    def __init__(
        self,
        path: str | Path,
        out_dir: str | Path | None = None,
        *,
        analyzer: ModelShardingAnalyzer | None = None,
    ) -> None:
        self._path = Path(path)
        self._out_dir = out_dir
        self.analyzer = analyzer or ModelShardingAnalyzer(path)

    def __repr__(self) -> str:
        return f"<ModelShardingManager {self._path}>"

    def folder(self, out_dir: str | Path | None = None) -> Path:
        """Where shards are written, given `out_dir`."""
        chosen = out_dir or self._out_dir
        default = self._path.with_name(f"{self._path.stem}.shards")
        return (default if chosen is None else Path(chosen)).absolute()

    # -- by layer ----------------------------------------------------------------------------------

    def shard(
        self,
        shards: int | None = None,
        *,
        strategy: str = DEFAULT_STRATEGY,
        capacity_bytes: int | None = None,
        hosts: Sequence[Host] | None = None,
        measured: Measurement | None = None,
        out_dir: str | Path | None = None,
    ) -> Manifest:
        """Plan (as `ModelShardingAnalyzer.plan` does) and cut, or reuse an earlier cut.

        Raises `BadInput` for `component_based`, which has nothing to cut: see `components`.
        """
        plan = self.plan(
            shards,
            strategy=strategy,
            capacity_bytes=capacity_bytes,
            hosts=hosts,
            measured=measured,
        )
        return self.cut([(span.start, span.end) for span in plan.spans], out_dir)

    def plan(
        self,
        shards: int | None = None,
        *,
        strategy: str = DEFAULT_STRATEGY,
        capacity_bytes: int | None = None,
        hosts: Sequence[Host] | None = None,
        measured: Measurement | None = None,
    ) -> Partition:
        """Which layers each shard would have. Writes nothing, but may measure."""
        if strategy == COMPONENT_BASED:
            raise BadInput(
                "component_based loads several models as they are, so there is nothing to cut: "
                "ModelShardingManager(folder).component_specs() gives them. To cut one model, use "
                f"strategy {' or '.join(map(repr, LAYER_STRATEGIES))}.",
                expected=list(LAYER_STRATEGIES),
                got=strategy,
            )
        self._check_file()
        return self.analyzer.plan(
            shards,
            capacity_bytes=capacity_bytes,
            hosts=hosts,
            strategy=strategy,
            measured=measured,
        )

    def cut(self, spans: Sequence[tuple[int, int]], out_dir: str | Path | None = None) -> Manifest:
        """The shards of these layers: those in the folder if they match, else newly cut.

        Files of an older cut that the new one does not have are removed from the folder. Raises
        as `sharding.cutting.cut.cut`, and `BadInput` for a folder whose manifest is not one of
        shards, or whose shards include the model itself.
        """
        self._check_file()
        folder = self.folder(out_dir)
        old = self._old_manifest(folder)
        if old is not None and self._matches(folder, old, spans):
            return old
        manifest = cut(self._path, spans, folder)
        kept = {file.name for shard in manifest.shards for file in shard.files}
        for file in (file for shard in old.shards for file in shard.files) if old else ():
            if file.name not in kept:
                with contextlib.suppress(OSError):  # a left-over file does no harm
                    (folder / file.name).unlink()
        return manifest

    def find(
        self, spans: Sequence[tuple[int, int]] | None = None, out_dir: str | Path | None = None
    ) -> Manifest | None:
        """The manifest in the folder, if it is of this model, with these `spans`, and undamaged.

        Without `spans`, of any cut: plans by measured times differ from one measurement to the
        next. Reads shards and model.
        """
        self._check_file()
        folder = self.folder(out_dir)
        old = self._old_manifest(folder)
        return old if old is not None and self._matches(folder, old, spans) else None

    def _matches(
        self, folder: Path, old: Manifest, spans: Sequence[tuple[int, int]] | None
    ) -> bool:
        if not old.order:
            return False  # of a version that did not keep the order of the outputs
        # The cheapest check first: the others read all of the model.
        if spans is not None and [s.span for s in old.shards] != [(a, b) for a, b in spans]:
            return False
        if old.source != read_signature(self._path, name=self._path.stem).digest:
            return False
        try:
            return read_manifest(folder) == old
        except NotAModel:
            return False  # a shard is damaged

    def _old_manifest(self, folder: Path) -> Manifest | None:
        path = folder / MANIFEST_NAME
        if not path.exists():
            return None
        try:
            old = read_manifest(folder, verify=False)
        except NotAModel as error:
            if (folder / _FIRST_SHARD).exists():
                return None  # damaged, or of another version
            raise BadInput(
                f"{path} is not the manifest of a cut model, and would be overwritten. Name "
                "another folder, or remove that file.",
                expected="a folder of shards, or one without a manifest",
                got=str(path),
            ) from error
        files = {(folder / file.name).resolve() for shard in old.shards for file in shard.files}
        if self._path.resolve() in files:
            raise BadInput(
                f"{self._path} is itself a shard in {folder}, and would be overwritten. Name "
                "another folder.",
                expected="another folder",
                got=str(folder),
            )
        return old

    def _check_file(self) -> None:
        if self._path.is_dir():
            raise NotAModel(
                f"{self._path}: expected an ONNX file to cut, got a folder. Give the file's path; "
                "if the folder holds several models that work together, use "
                f"{COMPONENT_BASED}: component_specs().",
                path=str(self._path),
                expected="an ONNX file",
                got="a folder",
            )

    # -- by component ------------------------------------------------------------------------------

    def components(self) -> Mapping[str, Path]:
        """The models in the folder, by name, each to be loaded in a browser of its own.

        The ONNX files in the folder and in its `onnx` subfolder are named by their stems. In other
        subfolders, `model.onnx` or the only ONNX file is named after the subfolder, and several
        are each named `subfolder.file`. Folders of shards are skipped. Variants of one model
        (int8, fp16) are listed separately: choose one.

        Raises `NotAModel`: no folder, fewer than two models, or two of one name.
        """
        if not self._path.is_dir():
            raise self._no_components("a file" if self._path.exists() else "no such folder")
        found: dict[str, Path] = {}
        try:
            listed = self._listed()
        except OSError as error:
            raise self._no_components(str(error)) from error
        for name, file in listed:
            if name in found:
                raise self._no_components(f"two called {name!r}: {found[name]} and {file}")
            found[name] = file.absolute()
        if not 2 <= len(found) <= COMPONENTS_MAX:
            raise self._no_components(", ".join(found) or "none")
        return found

    def component_specs(self, *names: str) -> Mapping[str, ModelSpec]:
        """The components' specs by name; of those named, or of all. Reads each file once.

        Raises `BadInput` for an unknown name, and as `components`.
        """
        components = self.components()
        if unknown := [name for name in names if name not in components]:
            raise BadInput(
                f"{self._path} has no component {', '.join(map(repr, unknown))}: it has "
                f"{', '.join(components)}.",
                expected=list(components),
                got=unknown,
            )
        return {name: read_signature(components[name], name=name) for name in names or components}

    def _listed(self) -> list[tuple[str, Path]]:
        listed = [
            (file.stem, file)
            for folder in (self._path, self._path / _ONNX_FOLDER)
            for file in _onnx_files(folder)
        ]
        for folder in sorted(path for path in self._path.iterdir() if path.is_dir()):
            if folder.name == _ONNX_FOLDER or folder.name.startswith("."):
                continue
            if (folder / MANIFEST_NAME).exists() and (folder / _FIRST_SHARD).exists():
                continue
            files = _onnx_files(folder)
            preferred = [file for file in files if file.name == _PREFERRED] or files
            if len(preferred) == 1:
                listed.append((folder.name, preferred[0]))
            else:
                listed += [(f"{folder.name}.{file.stem}", file) for file in files]
        return listed

    def _no_components(self, got: str) -> NotAModel:
        return NotAModel(
            f"{self._path}: expected a folder with 2 to {COMPONENTS_MAX} ONNX models, each of its "
            f"own name, got {got}. To cut one model between its layers, give the path of its ONNX "
            f"file and strategy {' or '.join(map(repr, LAYER_STRATEGIES))}.",
            path=str(self._path),
            expected=f"a folder with 2 to {COMPONENTS_MAX} ONNX models",
            got=got,
        )


def _onnx_files(folder: Path) -> list[Path]:
    files = (file for file in folder.glob("*.onnx") if not file.name.startswith("."))
    return sorted(file for file in files if file.is_file())
