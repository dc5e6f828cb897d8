"""The rules of the house, read from the source: who may import what, and who may do what."""

import ast
import builtins
import re
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
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
FRONT_DOORS = ("actors.bridge", "recovery.adjustments", "recovery.breaker", "recovery.control")

LINES_MAX = 500  # of a module, its documentation and blank lines included
STATEMENTS_MAX = 16  # of a method of a face
FACES = (
    ("pool/pool.py", "BrowserPool"),
    ("actors/browser/host.py", "BrowserHost"),
    ("actors/supervisor/supervisor.py", "Supervisor"),
    ("actors/bridge/bridge.py", "Bridge"),
)
_NAMED_TUPLE = ("_replace", "_asdict", "_fields", "_make")


@dataclass(frozen=True)
class Source:
    path: str
    tree: ast.Module

    def __str__(self) -> str:
        return self.path

    @property
    def room(self) -> str:
        return self.path.split("/")[0]

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @property
    def lines(self) -> int:
        return len((ROOT / self.path).read_text("utf-8").splitlines())

    def imported_modules(self, known: Collection[str]) -> Iterator[str]:
        """The modules of the project that are imported, a name of a package as its submodule."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in known)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    if inner in known or node.module in known:
                        yield inner if inner in known else str(node.module)

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


def packaged() -> tuple[Source, ...]:
    """The sources that are installed."""
    return tuple(source for source in sources() if source.room in PACKAGES)


def test_there_is_something_to_check():
    assert {source.room for source in sources()} == set(ROOMS)
    assert {"actors/driver/session.py", "pool/pool.py"} <= {source.path for source in sources()}


def test_imports_point_one_way():
    upward = [
        f"{source.path}:{line} imports {name}"
        for source in sources()
        for name, line in source.imports()
        if name.split(".")[0]
        in {*ROOMS, "tests", "scripts"} - set(ROOMS[ROOMS.index(source.room) :])
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    """Imports for types only count as well: who reads one module then has to read the other."""
    modules = {source.module: source for source in sources()}
    graph: dict[str, set[str]] = {}
    for name, source in modules.items():
        graph[name] = {found for found in source.imported_modules(modules.keys()) if found != name}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_each_dependency_has_one_door():
    trespasses = [
        f"{source.path}:{line} imports {name}"
        for source in packaged()
        for name, line in source.imports()
        if source.path not in DOORS.get(name.split(".")[0], {source.path})
    ]
    assert trespasses == []


def test_packages_are_entered_by_their_front_doors():
    past_the_door = [
        f"{source.path}:{line} imports {name}, not {package}"
        for source in sources()
        for name, line in source.imports()
        for package in FRONT_DOORS
        if name.startswith(f"{package}.") and not f"{source.module}.".startswith(f"{package}.")
    ]
    assert past_the_door == []


def test_no_module_is_longer_than_a_reader_takes_in():
    long = [
        f"{source.path}: {source.lines} lines" for source in sources() if source.lines > LINES_MAX
    ]
    assert long == []


@pytest.mark.parametrize(("path", "name"), FACES)
def test_a_face_delegates(path, name):
    """Each method of a class that callers meet is a few statements: its parts do the work."""
    (source,) = (source for source in sources() if source.path == path)
    (face,) = (n for n in source.tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    methods = [n for n in face.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert len(methods) > 10
    heavy = [
        f"{name}.{method.name}: {count} statements"
        for method in methods
        if method.name != "__init__" and (count := _statements(method)) > STATEMENTS_MAX
    ]
    assert heavy == []


def _statements(method: ast.AST) -> int:
    return sum(isinstance(node, ast.stmt) for node in ast.walk(method)) - 1


def test_no_part_reaches_into_what_another_keeps_for_itself():
    reaching = [
        f"{source.path}:{node.lineno} {ast.unparse(node)}"
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute)
        and re.fullmatch(r"_[a-z]\w*", node.attr)
        and node.attr not in _NAMED_TUPLE
        and _name(node.value) not in ("self", "cls", "super", "os")
    ]
    reaching += [
        f"{source.path}:{node.lineno} imports {alias.name} of {node.module}"
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ROOMS
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert reaching == []


def test_reaper_is_a_script_of_the_standard_library_alone():
    (reaper,) = [source for source in sources() if source.path == "actors/driver/reaper.py"]
    assert {name.split(".")[0] for name, _ in reaper.imports()} <= sys.stdlib_module_names


def test_recovery_starts_no_process_and_opens_no_socket():
    forbidden = {"socket", "subprocess", "asyncio", "threading", "aiohttp", "multiprocessing"}
    stores = {  # they write from a thread of their own
        "recovery/history/buffer.py",
        "recovery/history/store.py",
        "recovery/log/log.py",
    }
    for source in sources():
        if source.room == "recovery" and source.path not in stores:
            found = forbidden & {name.split(".")[0] for name, _ in source.imports()}
            assert not found, f"{source.path} imports {found}"


def test_every_module_says_what_it_is_for():
    assert [source.path for source in sources() if not ast.get_docstring(source.tree)] == []


# -- constructors ----------------------------------------------------------------------------------

_DOES_IO = re.compile(
    r"^(open|io\.open|print|input|exec|eval"
    r"|(socket|subprocess|shutil|urllib|requests|tempfile|glob|time\.sleep)\b.*"
    r"|os\.(?!path\b|environ\b|getpid$)\w+"
    r"|asyncio\.(create_task|ensure_future|run|start_server|open_connection|create_subprocess\w+)"
    r"|.*\.(read_text|read_bytes|write_text|write_bytes|mkdir|unlink|iterdir|remote|start|connect)"
    r")$"
)


def test_constructors_do_nothing_but_store():
    found = []
    classes = (
        (source, node)
        for source in packaged()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
    )
    for source, cls in classes:
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
    from actors.driver.binaries import Binaries
    from actors.driver.death_watch import DeathWatch
    from actors.driver.engines import default_settings
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


def test_no_error_is_swallowed_unnamed():
    """`except:`, `except Exception` and `except BaseException` must raise again."""
    found = []
    for source, node in all_nodes():
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


def all_nodes() -> Iterator[tuple[Source, ast.AST]]:
    return ((source, node) for source in packaged() for node in ast.walk(source.tree))


def test_every_error_raised_is_one_of_ours():
    """Built-in errors say nobody's fault; those that a module raises to itself are listed."""
    internal = {"ConnectionError", "OSError", "ValueError", "TimeoutError", "SystemExit"}
    found = []
    for source, node in all_nodes():
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = _name(node.exc.func)
            if isinstance(getattr(builtins, name, None), type) and name not in internal:
                found.append(f"{source.path}:{node.lineno}: raise {name}")
    assert found == []
