import copy
import pickle
from collections.abc import Iterator

import pytest

from recovery import errors
from recovery.errors import OperationFailed, PoolError
from tests import fakes


def tree(cls: type[PoolError]) -> Iterator[type[PoolError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from tree(child)


TREE = sorted(set(tree(PoolError)), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    "clone",
    [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_every_error_crosses_a_border_with_message_and_fields(cls, clone):
    error = cls("what happened", expected=[1, 2], got={"a": None})
    again = clone(error)
    assert type(again) is cls
    assert str(again) == again.message == "what happened"
    assert again.fields == {"expected": [1, 2], "got": {"a": None}}
    assert again.args == ("what happened",)


def test_every_error_says_whose_fault_it_is():
    faults = (
        errors.CallerError,
        errors.SetupError,
        errors.BrowserError,
        errors.InternalError,
        errors.PoolBusy,  # nobody's
        errors.OperationFailed,  # its failure says
    )
    assert all(cls is PoolError or issubclass(cls, faults) for cls in TREE)


def test_every_error_of_the_module_is_in_the_tree():
    defined = {
        thing
        for thing in vars(errors).values()
        if isinstance(thing, type) and issubclass(thing, BaseException)
    }
    assert defined <= set(TREE)


def test_a_failed_operation_carries_its_failure_through_a_pickle():
    failure = fakes.failure(evidence={"what": "browser_exited"})
    error = pickle.loads(pickle.dumps(OperationFailed("no answer", failure=failure)))
    assert error.failure == failure
    assert OperationFailed("no answer").failure is None
