"""The rules of the house, read from the source: who may import what, and who may do what."""

import ast
import builtins
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("benchmarks", "pool", "actors", "sharding", "recovery")  # each may import those after it
PACKAGES = ROOMS[1:]
# The only modules that may import each; scripts and benchmarks may import what they need.
DOORS = {
    "selenium": {"actors/driver/session.py"},
    "ray": {
        "actors/ray/cluster.py",
        "actors/ray/connection.py",
        "actors/ray/handles.py",
        "actors/ray/metrics.py",
        "actors/ray/own_process.py",
        "actors/ray/starting.py",
        "actors/ray/supervisor_handle.py",
        "actors/ray/supervisor_worker.py",
    },
    "onnx": {
        "sharding/cutting/cut.py",
        "sharding/cutting/graph.py",
        "sharding/models/signature.py",
    },
    "onnxruntime": {"sharding/models/native.py"},
    "duckdb": {"recovery/history/store.py"},
    "tokenizers": {"pool/models/tokens.py"},
    "matplotlib": {"pool/chaos/charts.py"},
}
# Packages whose modules are theirs alone: whoever is outside imports from the package.
FRONT_DOORS = ("recovery.adjustments", "recovery.control")


@dataclass(frozen=True)
class Source:
    path: str
    tree: ast.Module

    def __str__(self) -> str:
        return self.path

    @property
    def room(self) -> str:
        return self.path.split("/")[0]

    def imports(self) -> Iterator[tuple[str, int]]:
        """Every imported module with its line, inside functions too."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}:{node.lineno}: relative import"
                yield node.module or "", node.lineno
            elif isinstance(node, ast.Call) and _name(node.func).endswith("import_module"):
                raise AssertionError(f"{self.path}:{node.lineno}: import by text")


@cache
def sources() -> tuple[Source, ...]:
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            found.append(Source(str(path.relative_to(ROOT)), ast.parse(path.read_text("utf-8"))))
    return tuple(found)


def _name(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


each_source = pytest.mark.parametrize("source", sources(), ids=str)
packaged = pytest.mark.parametrize(
    "source", [source for source in sources() if source.room in PACKAGES], ids=str
)


def test_there_is_something_to_check():
    assert {source.room for source in sources()} == set(ROOMS)
    assert {"actors/driver/session.py", "pool/pool.py"} <= {source.path for source in sources()}


@each_source
def test_imports_point_one_way(source):
    allowed = ROOMS[ROOMS.index(source.room) :]
    upward = [
        f"{source.path}:{line} imports {name}"
        for name, line in source.imports()
        if name.split(".")[0] in {*ROOMS, "tests", "scripts"} - set(allowed)
    ]
    assert upward == []


@packaged
def test_each_dependency_has_one_door(source):
    trespasses = [
        f"{source.path}:{line} imports {name}"
        for name, line in source.imports()
        if source.path not in DOORS.get(name.split(".")[0], {source.path})
    ]
    assert trespasses == []


@each_source
def test_packages_are_entered_by_their_front_doors(source):
    module = source.path.removesuffix(".py").replace("/", ".")
    past_the_door = [
        f"{source.path}:{line} imports {name}"
        for name, line in source.imports()
        for door in FRONT_DOORS
        if name.startswith(f"{door}.") and not module.startswith(f"{door}.")
    ]
    assert past_the_door == []


def test_reaper_is_a_script_of_the_standard_library_alone():
    (reaper,) = [source for source in sources() if source.path == "actors/driver/reaper.py"]
    assert {name.split(".")[0] for name, _ in reaper.imports()} <= sys.stdlib_module_names


def test_recovery_starts_no_process_and_opens_no_socket():
    forbidden = {"socket", "subprocess", "asyncio", "threading", "aiohttp", "multiprocessing"}
    stores = {
        "recovery/log/log.py",
        "recovery/history/buffer.py",
        "recovery/history/store.py",
    }  # they are written from a thread of their own
    for source in sources():
        if source.room == "recovery" and source.path not in stores:
            found = forbidden & {name.split(".")[0] for name, _ in source.imports()}
            assert not found, f"{source.path} imports {found}"


@each_source
def test_every_module_says_what_it_is_for(source):
    assert ast.get_docstring(source.tree), f"{source.path} has no docstring"


# -- constructors ----------------------------------------------------------------------------------

_DOES_IO = re.compile(
    r"^(open|io\.open|print|input|exec|eval"
    r"|(socket|subprocess|shutil|urllib|requests|tempfile|glob|time\.sleep)\b.*"
    r"|os\.(?!path\b|environ\b|getpid$)\w+"
    r"|asyncio\.(create_task|ensure_future|run|start_server|open_connection|create_subprocess\w+)"
    r"|.*\.(read_text|read_bytes|write_text|write_bytes|mkdir|unlink|iterdir|remote|start|connect)"
    r")$"
)


@packaged
def test_constructors_do_nothing_but_store(source):
    found = []
    for cls in (node for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)):
        for made in cls.body:
            name = getattr(made, "name", "")
            if name not in ("__init__", "__new__", "__post_init__"):
                continue
            assert not isinstance(made, ast.AsyncFunctionDef)
            for node in ast.walk(made):
                if isinstance(node, ast.Await | ast.With | ast.AsyncWith):
                    found.append(f"{source.path}:{node.lineno}: {cls.name}")
                if isinstance(node, ast.Call) and _DOES_IO.match(_name(node.func)):
                    found.append(f"{source.path}:{node.lineno}: {cls.name}: {_name(node.func)}")
    assert found == []


def test_main_classes_are_made_without_any_io(monkeypatch):
    from actors.bridge import Bridge, PageConfig
    from actors.browser.host import BrowserHost
    from actors.dataplane import DataLink, DataServer
    from actors.driver.arguments import default_settings
    from actors.driver.binaries import Binaries
    from actors.driver.death_watch import DeathWatch
    from actors.driver.processes import ProcessReaper
    from actors.driver.session import Session
    from actors.messages import HostConfig
    from actors.ray.supervisor_worker import PoolSupervisor
    from actors.supervisor.records import SupervisorConfig
    from actors.supervisor.supervisor import Supervisor
    from pool import BrowserPool
    from pool.routing import Routing
    from recovery.kinds import BrowserType, Level
    from recovery.plan import STRATEGIES
    from recovery.supervision import RestartLimit

    chrome = BrowserType.CHROME
    config = SupervisorConfig(
        "p", Level.MEDIUM, STRATEGIES["progressive"], RestartLimit(), 15.0, False
    )
    settings = default_settings(chrome, root=False, small_shm=False)

    def refuse(*args, **kwargs):
        raise AssertionError(f"a constructor does I/O: {args}")

    with monkeypatch.context() as patch:
        for owner, name in (
            (socket, "socket"),
            (socket, "create_connection"),
            (subprocess, "Popen"),
            (builtins, "open"),
            (Path, "open"),
            (Path, "mkdir"),
        ):
            patch.setattr(owner, name, refuse)
        made = [
            Bridge(PageConfig(1, 1024, probe=False), refuse),
            BrowserHost("b", chrome, HostConfig(), refuse),
            DataLink("127.0.0.1:1", "token", 1024),
            DataServer(refuse, 1024),
            DeathWatch(),
            supervisor := PoolSupervisor(config, HostConfig()),
            Routing(refuse, "client", 1.0, "node", 1024),
            Session(settings, Binaries(chrome, "browser", "driver"), Path("profile")),
            Supervisor(config, refuse, refuse),
            ProcessReaper(),
            BrowserPool({"chrome": 2}),
        ]
    supervisor._unclaimed.cancel()  # the timer of a worker that nobody ever orders about
    assert "not open" in repr(made[-1])


# -- errors ----------------------------------------------------------------------------------------


@packaged
def test_no_error_is_swallowed_unnamed(source):
    """`except:`, `except Exception` and `except BaseException` must raise again."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            wide = re.search(r"\b(everything|Exception|BaseException)\b", caught)
            if wide and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                found.append(f"{source.path}:{node.lineno}: except {caught}")
        if isinstance(node, ast.Call) and _name(node.func).endswith("suppress"):
            for argument in node.args:
                if _name(argument) in ("Exception", "BaseException"):
                    found.append(f"{source.path}:{node.lineno}: suppress({_name(argument)})")
    assert found == []


@packaged
def test_every_error_raised_is_one_of_ours(source):
    """Built-in errors say nobody's fault; those that a module raises to itself are listed."""
    internal = {"ConnectionError", "OSError", "ValueError", "TimeoutError", "SystemExit"}
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = _name(node.exc.func)
            if isinstance(getattr(builtins, name, None), type) and name not in internal:
                found.append(f"{source.path}:{node.lineno}: raise {name}")
    assert found == []
