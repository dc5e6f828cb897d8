"""A passage as it is written by a pool: its text, its stages and what happens to them, shown live.

`write` reads a stream, keeps a `Shown` told, and kills a browser on the way if asked to. This
module must not open or close a pool, and does nothing about a fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from actors.faults import kill_process
from pool.pool import BrowserPool
from pool.results import RecoveryStep, Result
from pool.sequence import GeneratedToken, SequenceView, StageView
from recovery.errors import BadInput, SequenceLost

_LOOK_SECONDS = 0.1  # between two looks at a passage under way
_STEPS_SHOWN = 6  # the last of what happened, while it goes on
REBUILT = frozenset({"restored", "replayed"})  # steps that brought a stage to where it was


@dataclass(frozen=True)
class Kill:
    """A fault to make: SIGKILL for one stage's browser once `after` tokens have come.

    `stage` is its index; None means the middle one.
    """

    after: int
    stage: int | None = None


@dataclass(frozen=True)
class Killed:
    """A fault that was made, `at` seconds after the passage was begun.

    `before`: how many things had happened to the passage until then.
    """

    browser_id: str
    pid: int
    stage: int
    after: int
    at: float
    before: int = 0

    def __str__(self) -> str:
        return f"SIGKILL {self.browser_id}, stage {self.stage}, pid {self.pid}"


@dataclass
class Written:
    """A passage, whole or as far as it came. `stages`: where each was at the last look."""

    prompt: str = ""
    tokens: list[GeneratedToken] = field(default_factory=list)
    killed: Killed | None = None
    view: SequenceView = field(default_factory=SequenceView)
    browsers: dict[str, str] = field(default_factory=dict)  # by id: what each is
    result: Result | None = None

    @property
    def text(self) -> str:
        """What was delivered, each piece as it came; the prompt is not part of it."""
        return "".join(token.text for token in self.tokens)

    @property
    def rebuilt(self) -> list[RecoveryStep]:
        """The times that a stage was made anew in the middle of it."""
        return [step for step in self.view.recovery if step.what in REBUILT]

    @property
    def rebuilt_after_kill(self) -> list[RecoveryStep]:
        """Those of the stage whose browser was killed, from then on."""
        if self.killed is None:
            return []
        since = self.view.recovery[self.killed.before :]
        mark = f"(stage {self.killed.stage},"
        return [step for step in since if step.what in REBUILT and mark in step.where]


class Shown:
    """Who is told of a passage. As it is, it shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def piece(self, text: str) -> None:
        """This much text has come."""

    def struck(self, killed: Killed) -> None:
        """A browser has been killed."""

    def event(self, step: RecoveryStep) -> None:
        """Something happened besides the writing."""

    def look(self, written: Written) -> None:
        """How it is now."""


class PlainText(Shown):
    """The text alone, as it comes; what else there is to say, line by line, is for `note`.

    With `mark`, a kill is shown in the text itself.
    """

    def __init__(
        self, write: Callable[[str], None], note: Callable[[str], None], *, mark: bool = False
    ) -> None:
        self._write = write
        self._note = note
        self._mark = mark

    def piece(self, text: str) -> None:
        self._write(text)

    def struck(self, killed: Killed) -> None:
        if self._mark:
            self._write(f" [{killed}] ")
        else:
            self._note(str(killed))

    def event(self, step: RecoveryStep) -> None:
        self._note(step_line(step))

    def __exit__(self, *_: object) -> None:
        self._write("\n")


class Screen(Shown):
    """A terminal: text, a line for each stage, and recoveries, drawn anew as they change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._last = Written()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def look(self, written: Written) -> None:
        self._last = written
        self._live.update(picture(written, lines=self._console.height), refresh=True)

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        self._console.print(picture(self._last))


def screen_or(console: Console, plain: Shown) -> Shown:
    """What suits the console: `Screen` if it is a terminal, else `plain`."""
    return Screen(console) if console.is_terminal else plain


async def write(
    pool: BrowserPool,
    model: str,
    inputs: Mapping[str, Any],
    shown: Shown,
    *,
    kill: Kill | None = None,
) -> Written:
    """Have `model` go on with `inputs` (as for `pool.stream`), and show that.

    A sequence that is lost is no error here: its result says so. Raises what `stream` does else.
    """
    written = Written(str(inputs.get("text", "")), browsers=await _products(pool))
    ended: list[Result] = []
    views: list[Callable[[], SequenceView]] = []
    began = time.monotonic()
    with shown:
        stream = pool.stream(model, inputs, on_result=ended.append, on_begin=views.append)
        looking = _looking(pool, written, views, shown)
        async with looking as look, contextlib.aclosing(stream) as tokens:
            with contextlib.suppress(SequenceLost):
                async for token in tokens:
                    look()  # what happened on the way to this token comes before it
                    written.tokens.append(token)
                    shown.piece(token.text)
                    if kill is not None and len(written.tokens) == kill.after:
                        written.killed = await _strike(pool, views[0](), kill, began)
                        shown.struck(written.killed)
    (written.result,) = ended
    return written


@contextlib.asynccontextmanager
async def _looking(
    pool: BrowserPool, written: Written, views: list[Callable[[], SequenceView]], shown: Shown
) -> AsyncIterator[Callable[[], None]]:
    """Look at the passage from time to time, when told to, and once more in the end."""

    def look(*, last: bool = False) -> None:
        if not views:
            return
        view, told = views[0](), len(written.view.recovery)
        if last:  # the browsers have forgotten it: the stages stay as they were seen
            view = SequenceView(written.view.stages, view.recovery)
        for status in pool.hosts():
            written.browsers.setdefault(status.ref.browser_id, str(status.browser))
        written.view = view
        for step in view.recovery[told:]:
            shown.event(step)
        shown.look(written)

    async def keep_looking() -> None:
        while True:
            look()
            await asyncio.sleep(_LOOK_SECONDS)

    looking = asyncio.create_task(keep_looking(), name="looking")
    try:
        yield look
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        look(last=True)


async def _products(pool: BrowserPool) -> dict[str, str]:
    """What each browser is, by its own word."""
    records = (await pool.control()).browsers.values()
    return {
        record.id: f"{record.facts.product} {record.facts.version}"
        for record in records
        if record.facts is not None
    }


async def _strike(pool: BrowserPool, view: SequenceView, kill: Kill, began: float) -> Killed:
    index = len(view.stages) // 2 if kill.stage is None else kill.stage
    target = next((ref.browser_id for ref in view.stages[index].where), "")
    launches = (await pool.state()).launches
    if target not in launches:
        raise BadInput(f"stage {index} is in no browser that could be killed", got=target)
    pid = kill_process(launches[target], "browser")
    return Killed(target, pid, index, kill.after, time.monotonic() - began, len(view.recovery))


# -- drawing ---------------------------------------------------------------------------------------


def picture(written: Written, lines: int | None = None) -> RenderableType:
    """The passage as it stands. With `lines`, only the end of what is too long for so many."""
    steps = list(written.view.recovery)
    if lines is not None:
        steps = steps[-_STEPS_SHOWN:]
    parts: list[RenderableType] = [_text(written, lines), Text()]
    if written.view.stages:
        parts.append(_stages(written))
    parts += [Text(step_line(step), style=_style(step)) for step in steps]
    return Group(*parts)


def _text(written: Written, lines: int | None) -> Text:
    text = Text(written.prompt, style="dim")
    for count, token in enumerate(written.tokens, 1):
        text.append(token.text, style="not dim bold")
        if written.killed is not None and written.killed.after == count:
            text.append(f" [{written.killed}] ", style="not dim bold red")
    if lines is not None:
        # Half of the screen is the text's; 40 characters are the least that a line has.
        most = max(lines // 2, 2) * 40
        if len(text) > most:
            text = Text("... ", style="dim") + text[-most:]
    return text


def _stages(written: Written) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "layers", "browser", "kind", "position", ""):
        table.add_column(column, justify="right" if column in ("stage", "position") else "left")
    for index, stage in enumerate(written.view.stages):
        ids = [ref.browser_id for ref in stage.where]
        kinds = list(dict.fromkeys(written.browsers.get(name, "?") for name in ids))
        state = stage_state(stage)
        table.add_row(
            str(index),
            layers_words(stage.layers),
            ", ".join(str(ref) for ref in stage.where) or "-",
            ", ".join(kinds) or "-",
            str(stage.position),
            Text(state, style="yellow" if stage.rebuilding else "green"),
        )
    return table


def stage_state(stage: StageView) -> str:
    """What a stage is at, in a word or two."""
    if stage.rebuilding:
        return "being rebuilt" if stage.where else "waits for a browser"
    return "at work" if stage.where else "not begun"


def layers_words(layers: tuple[int, int] | None) -> str:
    """The layers of a stage as people count: first and last."""
    if layers is None:
        return "all"
    start, end = layers
    return str(start) if end - start == 1 else f"{start} to {end - 1}"


def step_line(step: RecoveryStep) -> str:
    """One thing that happened, as a line."""
    at, took = f"{step.at:7.3f} s", f"{step.seconds * 1e3:.0f} ms"
    return f"{at}  {step.what} {step.where}: {step.outcome} ({took})"


def _style(step: RecoveryStep) -> str:
    if step.what in REBUILT:
        return "green"
    return "red" if step.failure is not None else "yellow"
