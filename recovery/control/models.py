"""The transitions of models: which browsers load which, have loaded it, or have given up on it.

A model is loaded by every browser, or, if it is placed, by as many as its placing says. A load
that failed is retried; after two failures in a row it is given up on that browser, also if the
browser died while loading. This module must not change a browser's phase.
"""

from __future__ import annotations

from recovery.control.events import ModelFailed, ModelLoaded, ModelWanted
from recovery.control.instructions import Decision, Instruction, Load, Unload
from recovery.control.records import (
    COMING,
    BrowserRecord,
    ModelPhase,
    Phase,
    PoolState,
    record_of,
    with_record,
    without,
    without_model,
)
from recovery.failures import Failure
from recovery.frozen import replace
from recovery.placement import Slot, place

LOAD_ATTEMPTS_MAX = 2  # of a model on one browser; then it is given up there
LOAD_AGAIN_SECONDS = 0.5


def model_wanted(state: PoolState, body: ModelWanted) -> Decision:
    model, loads = body.model, []
    for record in state.browsers.values():
        record = without_model(record, model)  # the name may now mean another file
        if record.phase is Phase.READY and body.placing is None:
            loads.append(Load(record.id, record.epoch, model))
            record = replace(record, models={**record.models, model: ModelPhase.LOADING})
        state = with_record(state, record)
    models = {**state.models, model: body.digest}
    types = {**state.model_types, model: body.type}
    placed, parked = without(state.placed, model), without(state.parked, model)
    if body.placing is not None:
        placed[model] = body.placing
    state = replace(state, models=models, model_types=types, parked=parked, placed=placed)
    return state, tuple(loads)


def loaded_everywhere(state: PoolState) -> list[str]:
    return [model for model in state.models if model not in state.placed]


def placed(state: PoolState) -> Decision:
    """Load placed models that have too few copies on the browsers that `place` chooses."""
    slots = [
        Slot(
            record.id,
            str(record.kind),
            record.phase is Phase.READY,
            {model for model, phase in record.models.items() if phase is not ModelPhase.FAILED},
            {model for model in state.placed if load_given_up(record, model)},
        )
        for record in state.browsers.values()
        if record.phase in (Phase.READY, *COMING) and not record.stands_in_for
    ]
    loads = []
    for browser_id, model in place(state.placed, slots):
        record = state.browsers[browser_id]
        record = replace(record, models={**record.models, model: ModelPhase.LOADING})
        state = with_record(state, record)
        loads.append(Load(browser_id, record.epoch, model))
    return state, tuple(loads)


def model_parked(state: PoolState, model: str) -> Decision:
    if model not in state.models:
        return state, ()
    parked = {**state.parked, model: state.models[model]}
    types = state.model_types
    state, unloads = model_unwanted(state, model)
    return replace(state, parked=parked, model_types=types), unloads


def model_unwanted(state: PoolState, model: str) -> Decision:
    unloads = []
    for record in state.browsers.values():
        if model in record.models:
            unloads.append(Unload(record.id, record.epoch, model))
        breakers = without(record.breakers, model)  # its worker drops it, too
        state = with_record(state, replace(without_model(record, model), breakers=breakers))
    models, types = without(state.models, model), without(state.model_types, model)
    placed, parked = without(state.placed, model), without(state.parked, model)
    state = replace(state, models=models, model_types=types, parked=parked, placed=placed)
    return state, tuple(unloads)


def model_loaded(state: PoolState, body: ModelLoaded) -> PoolState:
    record = record_of(state, body.browser_id)
    if record.epoch != body.epoch or body.model not in record.models:
        return state
    record = replace(
        record,
        models={**record.models, body.model: ModelPhase.LOADED},
        numeric={**record.numeric, body.model: body.numeric},
        load_failures=without(record.load_failures, body.model),
        loads_failed=without(record.loads_failed, body.model),
    )
    return with_record(state, record)


def model_failed(state: PoolState, body: ModelFailed) -> Decision:
    record = record_of(state, body.browser_id)
    if record.epoch != body.epoch or body.model not in record.models:
        return state, ()
    record = _with_failed_load(record, body.model, body.failure)
    record = replace(record, numeric=without(record.numeric, body.model))
    if not load_given_up(record, body.model):
        again = Load(record.id, record.epoch, body.model, LOAD_AGAIN_SECONDS)
        return with_record(state, record), (again,)
    models = {**record.models, body.model: ModelPhase.FAILED}
    return with_record(state, replace(record, models=models)), ()


def with_interrupted_load(record: BrowserRecord, failure: Failure) -> BrowserRecord:
    """A browser that died while it loaded a model, with that load counted as failed.

    Loads run one at a time and in order, so it is the first that is not done.
    """
    loading = [m for m, phase in record.models.items() if phase is ModelPhase.LOADING]
    return _with_failed_load(record, loading[0], failure) if loading else record


def _with_failed_load(record: BrowserRecord, model: str, failure: Failure) -> BrowserRecord:
    counts = {**record.loads_failed, model: record.loads_failed.get(model, 0) + 1}
    failures = {**record.load_failures, model: failure}
    return replace(record, loads_failed=counts, load_failures=failures)


def load_given_up(record: BrowserRecord, model: str) -> bool:
    return record.loads_failed.get(model, 0) >= LOAD_ATTEMPTS_MAX


def loads_of(record: BrowserRecord) -> tuple[Instruction, ...]:
    return tuple(
        Load(record.id, record.epoch, model)
        for model, phase in record.models.items()
        if phase is ModelPhase.LOADING
    )
