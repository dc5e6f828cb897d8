"""Live view of a text that a pool generates: the text, its stages, and recovery steps.

`write` reads a stream, updates a `PassageDisplay`, and kills a browser midway if asked to. This
module must not open or close a pool, nor recover from a fault.
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
from pool.execution.sequence import GeneratedToken, SequenceView, StageView
from pool.pool import BrowserPool
from pool.results import RecoveryStep, Result
from recovery.errors import BadInput, SequenceLost

_POLL_SECONDS = 0.1  # between two updates of the display
_STEPS_SHOWN = 6  # the latest recovery steps, while the text is generated
REBUILT = frozenset({"restored", "replayed"})  # steps that rebuilt a stage


@dataclass(frozen=True)
class Kill:
    """A fault to inject: SIGKILL of one stage's browser after `after` tokens.

    `stage` is its index; None means the middle one.
    """

    after: int
    stage: int | None = None


@dataclass(frozen=True)
class Killed:
    """An injected fault, `at` seconds after the text was begun.

    `before`: the number of recovery steps until then.
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
    """A generated text, complete or as far as it got. `view`: its stages and recovery steps."""

    prompt: str = ""
    tokens: list[GeneratedToken] = field(default_factory=list)
    killed: Killed | None = None
    view: SequenceView = field(default_factory=SequenceView)
    browsers: dict[str, str] = field(default_factory=dict)  # by id: product and version
    result: Result | None = None

    @property
    def text(self) -> str:
        """The delivered text, without the prompt."""
        return "".join(token.text for token in self.tokens)

    @property
    def rebuilt(self) -> list[RecoveryStep]:
        """The steps that rebuilt a stage."""
        return [step for step in self.view.recovery if step.what in REBUILT]

    @property
    def rebuilt_after_kill(self) -> list[RecoveryStep]:
        """Those of the stage whose browser was killed, after the kill."""
        if self.killed is None:
            return []
        since = self.view.recovery[self.killed.before :]
        mark = f"(stage {self.killed.stage},"
        return [step for step in since if step.what in REBUILT and mark in step.where]


class PassageDisplay:
    """Shows a text as it is generated. This base class shows nothing."""

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
        """The text of another token has arrived."""

    def browser_killed(self, killed: Killed) -> None:
        """A browser has been killed."""

    def event(self, step: RecoveryStep) -> None:
        """A recovery step was taken."""

    def update(self, written: Written) -> None:
        """The current state, at each poll."""


class PlainText(PassageDisplay):
    """The text by `write` as it arrives; everything else by `note`, line by line.

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

    def browser_killed(self, killed: Killed) -> None:
        if self._mark:
            self._write(f" [{killed}] ")
        else:
            self._note(str(killed))

    def event(self, step: RecoveryStep) -> None:
        self._note(step_line(step))

    def __exit__(self, *_: object) -> None:
        self._write("\n")


class Screen(PassageDisplay):
    """A terminal: text, a line for each stage, and recovery steps, redrawn as they change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._last = Written()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def update(self, written: Written) -> None:
        self._last = written
        self._live.update(picture(written, lines=self._console.height), refresh=True)

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        self._console.print(picture(self._last))


def screen_or(console: Console, plain: PassageDisplay) -> PassageDisplay:
    """`Screen` if the console is a terminal, else `plain`."""
    return Screen(console) if console.is_terminal else plain


async def write(
    pool: BrowserPool,
    model: str,
    inputs: Mapping[str, Any],
    display: PassageDisplay,
    *,
    kill: Kill | None = None,
) -> Written:
    """Generate from `inputs` (as for `pool.stream`), and show it.

    A lost sequence is not raised: see `Written.result`. Raises what else `stream` raises.
    """
    written = Written(str(inputs.get("text", "")), browsers=await _products(pool))
    ended: list[Result] = []
    views: list[Callable[[], SequenceView]] = []
    began = time.monotonic()
    with display:
        stream = pool.stream(model, inputs, on_result=ended.append, on_begin=views.append)
        polling = _polling(pool, written, views, display)
        async with polling as poll, contextlib.aclosing(stream) as tokens:
            with contextlib.suppress(SequenceLost):
                async for token in tokens:
                    poll()  # recovery steps before this token are shown before it
                    written.tokens.append(token)
                    display.piece(token.text)
                    if kill is not None and len(written.tokens) == kill.after:
                        written.killed = await _kill(pool, views[0](), kill, began)
                        display.browser_killed(written.killed)
    (written.result,) = ended
    return written


@contextlib.asynccontextmanager
async def _polling(
    pool: BrowserPool,
    written: Written,
    views: list[Callable[[], SequenceView]],
    display: PassageDisplay,
) -> AsyncIterator[Callable[[], None]]:
    """Update `written` and the display periodically, on call, and once at the end."""

    def poll(*, last: bool = False) -> None:
        if not views:
            return
        view, shown = views[0](), len(written.view.recovery)
        if last:  # the browsers have dropped the sequence: keep the stages as last seen
            view = SequenceView(written.view.stages, view.recovery)
        for status in pool.hosts():
            written.browsers.setdefault(status.ref.browser_id, str(status.browser))
        written.view = view
        for step in view.recovery[shown:]:
            display.event(step)
        display.update(written)

    async def keep_polling() -> None:
        while True:
            poll()
            await asyncio.sleep(_POLL_SECONDS)

    polling = asyncio.create_task(keep_polling(), name="passage view")
    try:
        yield poll
    finally:
        polling.cancel()
        await asyncio.gather(polling, return_exceptions=True)
        poll(last=True)


async def _products(pool: BrowserPool) -> dict[str, str]:
    """Product and version of each browser, as it reports them."""
    records = (await pool.control()).browsers.values()
    return {
        record.id: f"{record.facts.product} {record.facts.version}"
        for record in records
        if record.facts is not None
    }


async def _kill(pool: BrowserPool, view: SequenceView, kill: Kill, began: float) -> Killed:
    index = len(view.stages) // 2 if kill.stage is None else kill.stage
    target = next((ref.browser_id for ref in view.stages[index].where), "")
    launches = (await pool.state()).launches
    if target not in launches:
        raise BadInput(f"stage {index} is in no running browser that could be killed", got=target)
    pid = kill_process(launches[target], "browser")
    return Killed(target, pid, index, kill.after, time.monotonic() - began, len(view.recovery))


# -- drawing ---------------------------------------------------------------------------------------


def picture(written: Written, lines: int | None = None) -> RenderableType:
    """The text and its stages. With `lines`, cut to the end of the text to fit so many lines."""
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
        # Half of the screen is for the text; a line holds at least 40 characters.
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
    """The state of a stage, in a few words."""
    if stage.rebuilding:
        return "being rebuilt" if stage.where else "waiting for a browser"
    return "running" if stage.where else "not started"


def layers_words(layers: tuple[int, int] | None) -> str:
    """The layers of a stage: first to last, inclusive."""
    if layers is None:
        return "all"
    start, end = layers
    return str(start) if end - start == 1 else f"{start} to {end - 1}"


def step_line(step: RecoveryStep) -> str:
    """A recovery step as one line."""
    at, took = f"{step.at:7.3f} s", f"{step.seconds * 1e3:.0f} ms"
    return f"{at}  {step.what} {step.where}: {step.outcome} ({took})"


def _style(step: RecoveryStep) -> str:
    if step.what in REBUILT:
        return "green"
    return "red" if step.failure is not None else "yellow"
