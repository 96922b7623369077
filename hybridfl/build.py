"""From a config node to an object: the signature of the ``_target_`` is the schema.

One builder serves every config group. Annotations say what is allowed: plain types, ``Literal`` choices, unions, small
dataclasses for nested options, and ``Annotated[..., Range(...)]`` for numbers. Whatever does not fit is a
:class:`~hybridfl.errors.ConfigError` that names the key, the value and the nearest valid choice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hybridfl.errors import ConfigError, nearest

EMPTY = inspect.Parameter.empty
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
_KINDS = {tuple: list | tuple, list: list | tuple, Sequence: list | tuple, dict: Mapping, Mapping: Mapping}
_CONTAINERS = (tuple, list, dict, Sequence, Mapping)
_UNRESOLVED = (NameError, TypeError, AttributeError, SyntaxError)


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, both included unless ``above``/``below`` say otherwise; infinite only if so said."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    infinite: bool = False

    def problem(self, value: float) -> str | None:
        if math.isinf(value) and not self.infinite:
            return "must be finite"
        if self.low is not None and value < self.low:
            return f"must be at least {self.low:g}; nearest valid value: {self.low:g}"
        if self.above is not None and value <= self.above:
            return f"must be above {self.above:g}"
        if self.high is not None and value > self.high:
            return f"must be at most {self.high:g}; nearest valid value: {self.high:g}"
        if self.below is not None and value >= self.below:
            return f"must be below {self.below:g}"
        return None


PositiveInt = Annotated[int, Range(low=1)]
NonNegativeInt = Annotated[int, Range(low=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(low=0)]
Fraction = Annotated[float, Range(low=0, high=1)]


def locate(dotted: str, key: str) -> Callable[..., Any]:
    """The class or function named by a dotted path.

    Raises:
        ConfigError: the module cannot be imported or has no such name.
    """
    module_name, _, name = dotted.rpartition(".")
    if not all(dotted.split(".")) or not module_name:
        raise ConfigError(key, f"'{dotted}' is not a dotted path such as hybridfl.methods.fedavg.FedAvg.")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module of the user's may fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(key, f"cannot import '{dotted}': {reason}.") from error
    try:
        found = getattr(module, name)
    except AttributeError:
        public = [other for other in vars(module) if not other.startswith("_")]
        raise ConfigError(key, f"module '{module_name}' has no '{name}'. {nearest(name, public)}") from None
    if not callable(found):
        raise ConfigError(key, f"'{dotted}' is a {type(found).__name__}, not a class or function.")
    return typing.cast(Callable[..., Any], found)


def build(node: Mapping[str, Any], key: str, context: Mapping[str, Any] | None = None) -> Any:
    """Call the node's ``_target_`` with its other keys, checked and converted.

    Args:
        node: plain containers, interpolations resolved.
        key: where the node stands in the config, for messages.
        context: values the program itself supplies (``input_shape``, …) to targets whose signature names them.
    """
    if "_target_" not in node:
        raise ConfigError(key, "needs a _target_: the dotted path of a class or function.")
    target = locate(str(node["_target_"]), f"{key}._target_")
    options = {name: value for name, value in node.items() if name != "_target_"}
    return call(target, options, key, context or {})


def signature_of(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Parameters of a target by name, and their resolved annotations; not to be changed, as they are kept."""
    return _kept_signature(target) if isinstance(target, Hashable) else _signature(target)


def _signature(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    parameters = {name: parameter for name, parameter in inspect.signature(target).parameters.items() if name != "self"}
    annotated = target.__init__ if inspect.isclass(target) else target
    # Fields that a dataclass inherits from another module have annotations that only resolve there.
    for source in (annotated, target) if dataclasses.is_dataclass(target) else (annotated,):
        with contextlib.suppress(*_UNRESOLVED):
            return parameters, typing.get_type_hints(source, include_extras=True)
    # A name that only a type checker sees must not lose the checks of the other parameters.
    namespace = getattr(inspect.unwrap(annotated), "__globals__", {})
    return parameters, {name: _resolved(parameter.annotation, namespace) for name, parameter in parameters.items()}


# Resolving annotations was half of the time that checking a config took.
_kept_signature = functools.lru_cache(maxsize=1024)(_signature)


def _resolved(annotation: Any, namespace: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, namespace)  # as typing.get_type_hints does
    except _UNRESOLVED:
        return EMPTY


def call(target: Callable[..., Any], options: Mapping[str, Any], key: str, context: Mapping[str, Any]) -> Any:
    """``target(**options)`` after every option was checked against the signature."""
    try:
        parameters, hints = signature_of(target)
    except ValueError as error:  # some builtin types have none
        problem = f"{error}; wrap it in a function of your own that names its arguments."
        raise ConfigError(f"{key}._target_" if key else "_target_", problem) from error
    takes_anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    arguments: dict[str, Any] = {}
    for name, value in options.items():
        place = f"{key}.{name}" if key else name
        if name not in named and not takes_anything:
            valid = [n for n in named if n not in context]
            raise ConfigError(place, f"unknown key. {nearest(name, valid) or 'It takes no keys.'}")
        arguments[name] = convert(value, hints.get(name, EMPTY), place, context)
    for name, parameter in named.items():
        if name in arguments:
            continue
        if name in context:
            arguments[name] = context[name]
        elif parameter.default is EMPTY:
            raise ConfigError(f"{key}.{name}" if key else name, "is required and not given.")
    if takes_anything and "num_classes" in context and not {"num_classes", "classes"} & {*named, *arguments}:
        # Model functions of torchvision and timm hand it on through their **kwargs.
        arguments["num_classes"] = context["num_classes"]
    try:
        return target(**arguments)
    except ConfigError as error:
        raise error.under(key) from error
    except ValueError as error:
        raise ConfigError(key, f"{getattr(target, '__name__', target)} refuses its options: {error}.") from error


def convert(value: Any, annotation: Any, key: str, context: Mapping[str, Any] | None = None) -> Any:
    """``value`` as the annotation wants it, or a :class:`ConfigError` that says why not."""
    context = context or {}
    is_node = isinstance(value, Mapping) and "_target_" in value
    if annotation in (EMPTY, Any, object):
        return build(value, key, context) if is_node else value
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Annotated:
        converted = convert(value, args[0], key, context)
        for constraint in args[1:]:
            if isinstance(constraint, Range) and isinstance(converted, int | float):
                problem = constraint.problem(converted)
                if problem:
                    raise ConfigError(key, f"got {_shown(value)}: {problem}.")
        return converted
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        raise ConfigError(key, f"got {_shown(value)}. {nearest(value, map(str, args))}")
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, key, context)
    if is_node and (annotation in _TYPE_NAMES or origin in _CONTAINERS):
        raise ConfigError(f"{key}._target_", f"got {value['_target_']!r}: {key} takes a plain value, not an object.")
    if is_node:
        return of_kind(build(value, key, context), annotation, key)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if isinstance(value, Mapping):
            return call(annotation, value, key, context)
        names = ", ".join(field.name for field in dataclasses.fields(annotation))
        raise ConfigError(key, f"got {_shown(value)}: expected a group of options ({names}).")
    if annotation in _TYPE_NAMES:
        return _convert_scalar(value, annotation, key)
    if origin is tuple or origin in (list, Sequence):
        if not isinstance(value, list | tuple):
            raise ConfigError(key, f"got {_shown(value)}: expected a list such as [1, 2].")
        kinds = [args[0] if args else EMPTY] * len(value)
        if origin is tuple and args and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise ConfigError(key, f"got {len(value)} items: expected {len(args)}.")
            kinds = list(args)
        items = [convert(v, k, f"{key}[{i}]", context) for i, (v, k) in enumerate(zip(value, kinds, strict=True))]
        return tuple(items) if origin is tuple else items
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(key, f"got {_shown(value)}: expected a mapping such as {{name: value}}.")
        return {k: convert(v, args[1] if args else EMPTY, f"{key}.{k}", context) for k, v in value.items()}
    if isinstance(value, Mapping | str | int | float | bool) or value is None:
        example = f"{key}={{_target_: …}}"
        raise ConfigError(key, f"got {_shown(value)}: expected a config group with a _target_, as in {example}.")
    return value


def of_kind(built: Any, annotation: Any, key: str) -> Any:
    """What was built, if it is what the annotation asks for: an instance of the class, or all members of the protocol."""
    if getattr(annotation, "_is_protocol", False):
        functions = {
            name for name, member in vars(annotation).items() if callable(member) or isinstance(member, property)
        }
        members = {*functions, *vars(annotation).get("__annotations__", {})}
        missing = sorted(name for name in members if not name.startswith("_") and not hasattr(built, name))
        if missing:
            problem = f"{type(built).__name__} is no {annotation.__name__}: it lacks {', '.join(missing)}."
            raise ConfigError(f"{key}._target_", problem)
    elif isinstance(annotation, type) and not isinstance(built, annotation):
        problem = f"gives a {type(built).__name__}, expected a {annotation.__name__}."
        raise ConfigError(f"{key}._target_", problem)
    return built


def _convert_union(value: Any, members: Sequence[Any], key: str, context: Mapping[str, Any]) -> Any:
    # The member whose type is exactly the value's goes first, so that 5 stays a whole number in `int | float`; a container,
    # and a group of options for a mapping, so that what is wrong within is said.
    exact = [m for m in members if _plain(m) is type(value) or isinstance(value, _KINDS.get(get_origin(m), ()))]
    exact += [m for m in members if dataclasses.is_dataclass(m) and isinstance(value, Mapping)]
    first: ConfigError | None = None
    for member in [*exact, *(m for m in members if m not in exact and _plain(m) is not type(None)), type(None)]:
        if member is type(None) and member not in members:
            break
        try:
            return convert(value, member, key, context)
        except ConfigError as error:
            first = first or error
    raise first or ConfigError(key, f"got {_shown(value)}.")


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _convert_scalar(value: Any, kind: type, key: str) -> Any:
    wrong = ConfigError(key, f"got {_shown(value)}: expected {_TYPE_NAMES[kind]}.")
    if kind is type(None):
        if value is None:
            return None
        raise wrong
    if isinstance(value, bool) or kind is bool:
        if isinstance(value, bool) and kind is bool:
            return value
        raise wrong
    if kind is int:
        if isinstance(value, int):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        raise wrong
    if kind is float:
        if isinstance(value, int | float) and not math.isnan(value):
            return float(value)
        raise wrong
    if isinstance(value, str):
        return value
    raise wrong


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
