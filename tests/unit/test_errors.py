"""Every error: its place in the tree, its text, and that it crosses a process border with type and fields."""

import copy
import pickle

import pytest

from rayk import errors
from rayk.errors import InsufficientBlocksError, NotClaimedError, RaykError, ReplicaLostError, by_name

VALUES = {"str": "some {text}", "int": 3, "float": 2.0, "list[str]": ["a", "b"], "dict[str, str]": {"a": "why"}}
BUILT_IN = {
    "ConfigError": ValueError,
    "TokenError": ValueError,
    "AlreadyClaimedError": ValueError,
    "NotClaimedError": ValueError,
    "ReplicaIndexError": IndexError,
    "ReplicaRemovedError": IndexError,
    "ReplicaStateError": ValueError,
    "BatchError": ValueError,
    "LeafError": AssertionError,
    "PlanError": RuntimeError,
    "NotBuiltError": NotImplementedError,
    "ClosedError": RuntimeError,
    "IntegrityError": AssertionError,
    "ClusterError": RuntimeError,
    "CallTimeoutError": TimeoutError,
    "MessageError": ValueError,
}


def concrete() -> list[type[RaykError]]:
    found, todo = [], [RaykError]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        found.append(cls)
    return sorted((cls for cls in found if cls.__module__ == errors.__name__), key=lambda cls: cls.__name__)


def example(cls: type[RaykError]) -> RaykError:
    kinds = {
        name: kind for base in reversed(cls.__mro__) for name, kind in vars(base).get("__annotations__", {}).items()
    }
    return cls(*(VALUES[kinds[name]] for name in cls.fields))


@pytest.mark.parametrize("cls", concrete(), ids=lambda cls: cls.__name__)
class TestEach:
    def test_round_trips_with_type_and_fields(self, cls: type[RaykError]) -> None:
        error = example(cls)
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(again) is cls
            assert again.args == error.args
            assert {n: getattr(again, n) for n in cls.fields} == {n: getattr(error, n) for n in cls.fields}
            assert str(again) == str(error)

    def test_its_text_shows_its_fields(self, cls: type[RaykError]) -> None:
        text = str(example(cls))
        for name in cls.fields:
            if name not in ("trace", "total", "holder"):  # shown only where they matter
                value = getattr(example(cls), name)
                parts = value.items() if isinstance(value, dict) else value if isinstance(value, list) else [value]
                parts = [part for each in parts for part in (each if isinstance(each, tuple) else [each])]
                assert all(str(part) in text for part in parts) or (
                    isinstance(value, float) and f"{value:.0f}" in text
                ), name

    def test_is_found_by_name(self, cls: type[RaykError]) -> None:
        assert by_name(cls.__name__) is cls

    def test_takes_exactly_its_fields(self, cls: type[RaykError]) -> None:
        with pytest.raises(TypeError, match=cls.__name__):
            cls(*example(cls).args, "one too many")

    def test_is_drawn_in_the_tree_of_the_docstring(self, cls: type[RaykError]) -> None:
        assert cls.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize(("name", "base"), BUILT_IN.items())
def test_built_in_bases(name: str, base: type[Exception]) -> None:
    found = by_name(name)
    assert found is not None and issubclass(found, base)


def test_a_refused_batch_is_both_kinds_of_error() -> None:
    assert issubclass(errors.RuntimeInputsError, ValueError) and issubclass(errors.RuntimeInputsError, RuntimeError)


def test_running_out_of_pages_is_no_value_error() -> None:
    assert not issubclass(InsufficientBlocksError, ValueError | RuntimeError)


def test_an_unknown_name_is_none() -> None:
    assert by_name("ValueError") is None


def test_texts_say_what_to_do_next() -> None:
    assert "it can never fit" in str(InsufficientBlocksError("r", 0, 9, 2, 8))
    assert "retry later" in str(InsufficientBlocksError("r", 0, 3, 2, 8))
    assert "claimed on replica 1" in str(NotClaimedError("r", 0, 1))
    assert "call claim()" in str(NotClaimedError("r", 0, -1))


def test_a_lost_replica_names_a_few_of_its_requests() -> None:
    text = str(ReplicaLostError(1, 2, [f"r{i}" for i in range(9)], "killed"))
    assert "9 claimed request(s)" in text and "'r4', .." in text and "'r5'" not in text
    assert "0 claimed request(s)." in str(ReplicaLostError(1, 2, [], "killed"))
