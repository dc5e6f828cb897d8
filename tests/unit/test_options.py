"""Nothing only looks like an option: every field, setting, view and command-line option is read."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from actors.messages import HostConfig
from actors.supervisor.records import SupervisorConfig
from pool import BrowserPool, Result
from pool.chaos.plan import Plan
from pool.commands.main import COMMANDS, GROUPS, app
from pool.config import PoolConfig
from recovery.breaker import BreakerConfig, RegistryConfig
from recovery.history.config import HistoryConfig
from recovery.history.questions import QUESTIONS
from recovery.history.schema import VIEWS
from recovery.log.writing import LogConfig
from recovery.resources import ResourceLimits
from recovery.scaling import ScalingLimits
from recovery.supervision import RestartLimit
from sharding.sequences.rules import PipelineRules

ROOT = Path(__file__).parents[2]
SETTINGS = (
    BreakerConfig,
    HistoryConfig,
    HostConfig,
    LogConfig,
    PipelineRules,
    Plan,
    PoolConfig,
    RegistryConfig,
    ResourceLimits,
    RestartLimit,
    ScalingLimits,
    SupervisorConfig,
)


@cache
def reads() -> frozenset[str]:
    """The names of all attributes that the packages read, but for where settings are checked."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and node.name in ("__post_init__", "checked"):
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        for child in ast.iter_child_nodes(node):
            visit(child)

    for room in ("pool", "actors", "sharding", "recovery"):
        for path in (ROOT / room).rglob("*.py"):
            visit(ast.parse(path.read_text()))
    return frozenset(found)


@pytest.mark.parametrize(
    ("settings", "name"),
    [(settings, f.name) for settings in SETTINGS for f in fields(settings) if f.init],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_field_of_every_setting_is_read_where_it_works(settings, name):
    assert name in reads(), f"{settings.__name__}.{name} is read by nobody"


def test_every_view_that_the_history_has_can_be_asked_for():
    assert set(VIEWS) <= set(QUESTIONS)


def test_every_question_and_view_is_named_where_users_look():
    text = (ROOT / "docs" / "monitoring.md").read_text()
    missing = [question for question in QUESTIONS if f"`{question}`" not in text]
    named = [question for question in missing if f'"{question}"' not in text]
    assert not named, f"docs/monitoring.md names no {', '.join(named)}"


# -- the command line ------------------------------------------------------------------------------


def commands() -> list:
    groups = [made for group in GROUPS.values() for made in group.registered_commands]
    return [command.run for command in COMMANDS] + [made.callback for made in groups]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.__name__)
def test_every_option_of_a_command_is_read_by_it(command):
    tree = ast.parse(inspect.getsource(command).strip())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    used = {
        node.id
        for statement in function.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name)
    }
    unread = [name for name in inspect.signature(command).parameters if name not in used]
    assert "locals" in used or not unread, f"{command.__name__} reads no {', '.join(unread)}"


# -- the documents ---------------------------------------------------------------------------------

_KEYWORD = re.compile(r"`(?:[\w.]+\()?(\w+)=[^`]*`")
_LONG_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]+)")


def taken() -> set[str]:
    """What users can pass or find by name: options, parameters of calls, fields of a result."""
    names = {f.name for record in (*SETTINGS, Result) for f in fields(record)}
    calls = [call for _, call in inspect.getmembers(BrowserPool, inspect.isfunction)]
    for call in calls:
        names |= set(inspect.signature(call).parameters)
    return names


def documents() -> list[Path]:
    return [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_documents_name_no_option_of_a_pool_that_nobody_takes(document):
    from recovery.adjustments import ADJUSTMENTS

    adjusted = {name for row in ADJUSTMENTS for name in (*row.preferences, *row.environment)}
    text = document.read_text()
    calls = re.findall(r"(?:BrowserPool|pool\.\w+)\(([^`\n]*)\)", text)
    named = {name for call in calls for name in re.findall(r"(\w+)=", call)}
    named |= {name for name in _KEYWORD.findall(text) if name.islower()}
    unknown = named - taken() - adjusted - _NOT_OURS
    assert not unknown, f"{document.name} names {', '.join(sorted(unknown))}"


# Keywords of others in the documents: of filters and views, of Ray, of browsers' own arguments.
_NOT_OURS = {"by", "error_type", "resources", "limit", "race"}


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_documents_name_no_command_line_option_that_no_command_has(document):
    known = {
        option for command in all_commands() for made in command.params for option in made.opts
    }
    named = {
        f"--{option}"
        for line in document.read_text().splitlines()
        for words in re.findall(r"tabpool [a-z]+ [^`#]*", line)
        for option in _LONG_OPTION.findall(words)
    }
    assert "--json" in known
    assert named <= known | {"--help"}, f"{document.name}: {', '.join(sorted(named - known))}"


def all_commands() -> list[Any]:
    """Every command and subcommand, as typer has understood them."""
    top: Any = typer.main.get_command(app)
    nested = [getattr(made, "commands", {made.name: made}) for made in top.commands.values()]
    return [command for group in nested for command in group.values()]
