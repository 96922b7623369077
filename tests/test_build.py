"""The builder: whatever does not fit a signature is refused under the key that was typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import pytest

from hybridfl.build import Range, build, call, convert, locate
from hybridfl.errors import ConfigError
from hybridfl.optimizers import SGD, LocalWork

if TYPE_CHECKING:
    from nowhere import Unknown


@dataclass(frozen=True)
class Inner:
    size: Annotated[int, Range(low=1)] = 4
    kind: Literal["mean", "sum"] = "mean"


@dataclass(frozen=True)
class Outer:
    width: int
    inner: Inner = field(default_factory=Inner)
    rate: Annotated[float, Range(above=0, high=1)] | None = None
    count: Annotated[int, Range(low=1)] | Annotated[float, Range(above=0, high=1)] = 2
    names: tuple[str, ...] = ()
    flag: bool = False
    part: LocalWork | None = None

    def __post_init__(self) -> None:
        if self.width == 13:
            raise ConfigError("width", "got 13, unlucky.")


@dataclass(frozen=True, kw_only=True)
class Mine(SGD):
    """Inherits fields whose annotations only resolve in the module of the parent."""

    extra: float = 0.0


class Shaped:
    def __init__(self, input_shape: tuple[int, ...], inner: Inner | None = None, scale: float = 1.0) -> None:
        self.input_shape, self.inner, self.scale = input_shape, inner, scale


class Wrapper:
    def __init__(self, base: Shaped) -> None:
        self.base = base


def anything(known: int, **others: Any) -> dict[str, Any]:
    return {"known": known} | others


def half_known(other: Unknown, size: int = 1) -> tuple[Any, int]:
    return other, size


def node(target: object, **options: Any) -> dict[str, Any]:
    return {"_target_": f"{__name__}.{getattr(target, '__name__', target)}", **options}


def refused(text: str, **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(node(Outer, **{"width": 1, **options}), "group")
    assert text in str(caught.value)
    return caught.value


def test_a_node_becomes_its_target_with_converted_options() -> None:
    built = build(node(Outer, width=3.0, inner={"size": 2}, rate=1, names=["a", "b"]), "group")
    assert built == Outer(3, Inner(2), 1.0, 2, ("a", "b"))
    assert (type(built.width), type(built.rate)) == (int, float)


def test_unknown_keys_name_the_nearest_valid_one() -> None:
    error = refused("Did you mean 'width'?", widht=3)
    assert error.key == "group.widht"
    assert refused("Did you mean 'size'?", inner={"sise": 1}).key == "group.inner.sise"


def test_a_required_option_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"^group\.width: is required"):
        build(node(Outer), "group")


def test_at_the_top_a_key_has_no_prefix() -> None:
    with pytest.raises(ConfigError, match=r"^widht: unknown"):
        call(Outer, {"widht": 1}, "", {})
    with pytest.raises(ConfigError, match=r"^width: got 13"):
        call(Outer, {"width": 13}, "", {})


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("width", "5", "got '5': expected a whole number"),
        ("width", 1.5, "got 1.5: expected a whole number"),
        ("width", float("inf"), "expected a whole number"),
        ("width", True, "got true: expected a whole number"),
        ("width", None, "got null: expected a whole number"),
        ("flag", 1, "got 1: expected true or false"),
        ("names", "ab", "got 'ab': expected a list"),
        ("names[1]", ["a", 2], "got 2: expected a text"),
        ("inner", 3, "got 3: expected a group of options (size, kind)"),
        ("inner.kind", {"kind": "men"}, "Did you mean 'mean'?"),
        ("inner.size", {"size": 0}, "got 0: must be at least 1; nearest valid value: 1"),
        ("rate", float("nan"), "expected a number"),
        ("rate", True, "expected a number"),
        ("rate", 0, "must be above 0"),
        ("rate", 1.01, "must be at most 1; nearest valid value: 1"),
        ("count", 0, "must be at least 1"),
        ("count", 1.5, "must be at most 1"),
        ("count", "x", "expected a whole number"),
        ("part", "sgd", "expected a group of options (lr, batch_size,"),
        ("part.lr", {"lr": 0.0}, "must be above 0"),
    ],
)
def test_types_and_ranges(key: str, value: Any, text: str) -> None:
    option = key.partition(".")[0].partition("[")[0]
    assert refused(text, **{option: value}).key == f"group.{key}"


@pytest.mark.parametrize(("value", "expected"), [(5, 5), (5.0, 5), (0.5, 0.5), (1.0, 1.0), (1, 1)])
def test_a_union_keeps_a_whole_number_whole(value: float, expected: float) -> None:
    built = build(node(Outer, width=1, count=value), "group").count
    assert (built, type(built)) == (expected, type(expected))


def test_null_is_what_an_optional_says_it_is() -> None:
    assert build(node(Outer, width=1, rate=None), "group").rate is None
    assert refused("got null: expected true or false", flag=None).key == "group.flag"


@pytest.mark.parametrize("bound", [{"low": 1}, {"high": 1}, {"above": 1}, {"below": 1}])
def test_bounds_are_included_unless_said_otherwise(bound: dict[str, float]) -> None:
    limit = Range(**bound)
    side = -1 if {"low", "above"} & bound.keys() else 1
    assert (limit.problem(1) is None) == bool({"low", "high"} & bound.keys())
    assert limit.problem(1 - side * 0.5) is None
    assert limit.problem(1 + side * 0.5) is not None


def test_context_goes_to_targets_that_name_it_at_any_depth() -> None:
    context = {"input_shape": (1, 2, 3), "classes": 4}
    built = build(node(Wrapper, base=node(Shaped, scale=2)), "model", context)
    assert (built.base.input_shape, built.base.scale, built.base.inner) == ((1, 2, 3), 2.0, None)
    assert build(node(Outer, width=1), "model", context) == Outer(1)
    own = build(node(Shaped, input_shape=[7]), "model", context)
    assert own.input_shape == (7,)


def test_context_is_not_offered_as_a_key() -> None:
    with pytest.raises(ConfigError) as caught:
        build(node(Shaped, scal=1), "model", {"input_shape": (1,)})
    assert "'scale'" in caught.value.problem
    assert "input_shape" not in caught.value.problem


def test_a_target_with_open_keywords_takes_what_it_does_not_name() -> None:
    assert build(node(anything, known=1, other="x"), "group") == {"known": 1, "other": "x"}
    with pytest.raises(ConfigError, match=r"^group\.known: got 'x'"):
        build(node(anything, known="x"), "group")


def test_an_error_of_the_target_itself_comes_under_its_key() -> None:
    assert refused("unlucky", width=13).key == "group.width"
    with pytest.raises(ConfigError, match=r"^group\.part\.nesterov: got true with momentum 0"):
        build(node(Outer, width=1, part={"_target_": "hybridfl.optimizers.SGD", "nesterov": True}), "group")


def test_inherited_fields_are_checked_too() -> None:
    assert build(node(Mine, lr=1, extra=2), "client_optimizer") == Mine(lr=1.0, extra=2.0)
    with pytest.raises(ConfigError, match=r"^client_optimizer\.lr: got -1"):
        build(node(Mine, lr=-1), "client_optimizer")


def test_a_name_only_a_type_checker_sees_leaves_the_other_checks() -> None:
    assert build(node(half_known, other=[1], size=2.0), "group") == ([1], 2)
    with pytest.raises(ConfigError, match=r"^group\.size: got 'x'"):
        build(node(half_known, other=1, size="x"), "group")


@pytest.mark.parametrize(
    ("dotted", "text"),
    [
        ("FedAvg", "is not a dotted path"),
        (".relative.Name", "is not a dotted path"),
        ("hybridfl.methods.fedavg.", "is not a dotted path"),
        ("hybridfl.nowhere.FedAvg", "cannot import"),
        ("hybridfl.methods.fedavg.FedAvgg", "Did you mean 'FedAvg'?"),
        ("hybridfl.types.SERVER", "is a int, not a class or function"),
    ],
)
def test_targets_that_are_not_there(dotted: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"_target_": dotted}, "baseline")
    assert caught.value.key == "baseline._target_"
    assert text in caught.value.problem


def test_a_node_without_a_target_and_a_target_without_a_signature() -> None:
    with pytest.raises(ConfigError, match=r"^model: needs a _target_"):
        build({}, "model")
    with pytest.raises(ConfigError, match=r"^model\._target_: .*wrap it"):
        build({"_target_": "builtins.dict"}, "model")


def test_locate_finds_functions_and_classes() -> None:
    assert locate("hybridfl.build.build", "x") is build


class Anything(Protocol):
    def run(self) -> None: ...


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ([1, 2.0], list[int], [1, 2]),
        ([1], Sequence[float], [1.0]),
        ([1, "a"], tuple[int, str], (1, "a")),
        ([], tuple[int, ...], ()),
        ([1], tuple, (1,)),
        ({"a": 1}, Mapping[str, float], {"a": 1.0}),
        ({"a": 1}, dict, {"a": 1}),
        ({"a": 1}, object, {"a": 1}),
        (3, Any, 3),
    ],
)
def test_containers(value: Any, annotation: Any, expected: Any) -> None:
    converted = convert(value, annotation, "key")
    assert converted == expected
    assert repr(converted) == repr(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "key"),
    [
        ([1], tuple[int, str], "key"),
        ([1, 2], tuple[int, str], "key[1]"),
        ({"a": "x"}, Mapping[str, float], "key.a"),
        ([1], dict[str, int], "key"),
    ],
)
def test_containers_that_do_not_fit(value: Any, annotation: Any, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(value, annotation, "key")
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("value", "key", "text"),
    [
        ({0: 1, 3: "x"}, "key.3", "got 'x': expected a whole number"),
        ([0.5, "x"], "key[1]", "got 'x': expected a number"),
        ("x", "key", "got 'x': expected a whole number"),
    ],
)
def test_a_container_in_a_choice_of_types_is_refused_for_what_is_in_it(value: Any, key: str, text: str) -> None:
    annotation = int | float | tuple[float, ...] | Mapping[int, int] | None
    with pytest.raises(ConfigError, match=text) as caught:
        convert(value, annotation, "key")
    assert caught.value.key == key
    assert convert([1], annotation, "key") == (1.0,)
    assert convert({0: 1}, annotation, "key") == {0: 1}


@pytest.mark.parametrize("value", [3, "x", None, {"a": 1}])
def test_an_object_needs_a_target(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^key: got .*expected a config group with a _target_"):
        convert(value, Anything, "key")


class Speaks(Protocol):
    volume: int

    def speak(self) -> str: ...


class Dog:
    volume = 3

    def speak(self) -> str:
        return "wow"


class Mute:
    volume = 0


def fails(size: int = 1) -> None:
    raise ValueError("size is odd")


@pytest.mark.parametrize("annotation", [int, str, Annotated[float, Range(low=0)], list[int]])
def test_an_object_is_refused_where_a_plain_value_belongs(annotation: Any) -> None:
    with pytest.raises(ConfigError, match=r"^norm\._target_: .*plain value"):
        convert(node(Dog), annotation, "norm")


def test_what_is_built_must_be_of_the_kind_asked_for() -> None:
    assert convert(node(Dog), Speaks, "pet").speak() == "wow"
    with pytest.raises(ConfigError, match=r"^pet\._target_: Mute is no Speaks: it lacks speak\.$"):
        convert(node(Mute), Speaks, "pet")
    with pytest.raises(ConfigError, match=r"^part\._target_: gives a Dog, expected a LocalWork\.$"):
        convert(node(Dog), LocalWork, "part")


def test_a_value_error_of_the_target_comes_under_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^thing: fails refuses its options: size is odd\.$"):
        build(node(fails), "thing")


def test_a_module_that_fails_to_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn_module.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"^model\._target_: cannot import 'torn_module\.Net': SyntaxError"):
        locate("torn_module.Net", "model._target_")
