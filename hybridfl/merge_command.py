"""``hybridfl merge``: saved models into one, and with ``--on`` how good they are and what lies between them."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridfl.errors import ConfigError, nearest

if TYPE_CHECKING:
    from hybridfl.federation import Federation
    from hybridfl.merging.measured import Measured
    from hybridfl.params import Params

METHODS = {
    "mean": "hybridfl.merging.weighted_mean.weighted_mean",
    "task_arithmetic": "hybridfl.merging.task_arithmetic.task_arithmetic",
    "ties": "hybridfl.merging.ties.ties",
    "dare": "hybridfl.merging.dare.dare",
    "slerp": "hybridfl.merging.slerp.slerp",
    "fisher": "hybridfl.merging.fisher_mean.fisher_mean",
    "regmean": "hybridfl.merging.regmean.regmean",
    "median": "hybridfl.merging.coordinatewise.median",
    "trimmed_mean": "hybridfl.merging.coordinatewise.trimmed_mean",
    "geometric_median": "hybridfl.merging.geometric_median.geometric_median",
    "krum": "hybridfl.merging.krum.krum",
    "greedy_soup": "hybridfl.merging.soup.greedy_soup",
}
"""Name → function. Its signature is the schema: ``models``, ``weights`` and ``base``, where it has them, come from the
command line, what :data:`MEASURED` names from the config of ``--on``, and its other arguments are the options."""

ALIGNMENTS = {
    "weight_matching": "hybridfl.merging.rebasin.by_weights",
    "activation_matching": "hybridfl.merging.rebasin.by_activations",
}
"""The same for functions that give the models with their hidden units in the first one's order; then comes the mean."""

GIVEN = {"models": "FILE …", "weights": "--weights", "base": "--base FILE"}
MEASURED = {
    "net": "the net",
    "example": "the form of its inputs",
    "examples": "training examples",
    "grams": "training examples",
    "fishers": "training examples",
    "score": "training examples",
}
"""Attributes of :class:`hybridfl.merging.measured.Measured`, and what they come from."""
EXAMPLES = 1000

EPILOG = f"""\
methods: {", ".join([*METHODS, *ALIGNMENTS])}
  task_arithmetic, ties and dare merge what the models learned since the base they were trained from
  fisher and regmean weigh the models by statistics on training examples of the config given by --on
  median, trimmed_mean, geometric_median and krum hold against single models that are far from the others
  greedy_soup averages the models that make the mean no less accurate on training examples of --on
  weight_matching and activation_matching bring hidden units into the order of the first model's before the mean; the
  net, and what activations are of, are those of --on

  hybridfl merge a.safetensors b.safetensors -o mean.safetensors
  hybridfl merge a.pt b.pt c.pt --base start.pt --method ties --option density=0.3 -o ties.safetensors
  hybridfl merge a.pt b.pt -o mean.pt --on dataset=fashion_mnist model=cnn
  hybridfl merge a.pt b.pt -o mean.pt --method weight_matching --on dataset=fashion_mnist model=cnn
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl merge``."""
    parser.epilog = EPILOG
    parser.add_argument("models", nargs="+", type=Path, metavar="FILE", help="state dicts: safetensors, or torch.save")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the merged model")
    parser.add_argument("--method", default="mean", metavar="NAME", help="see below (default: %(default)s)")
    parser.add_argument("--base", type=Path, metavar="FILE", help="what the models were trained from")
    parser.add_argument("--weights", metavar="W,W,…", help="one a model, such as 0.7,0.3")
    parser.add_argument("--option", nargs="+", action="extend", default=[], metavar="key=value", help="of the method")
    parser.add_argument("--model", metavar="NAME", help="the same as --on model=NAME, beside what --on says")
    parser.add_argument(
        "--on",
        nargs="*",
        metavar="key=value",
        help="score inputs and result, and the loss barriers between the inputs, on the test part of this config: "
        "overrides as of train",
    )
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help=f"of the training part of --on that a method looks at, at most (default: {EXAMPLES})",
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with config groups of your own")


def run(args: argparse.Namespace) -> int:
    """Writes the merged model, prints what was asked for and returns the exit status."""
    if args.model is not None:
        args.on = [*(args.on or []), f"model={args.model}"]
    weights, options = _weights(args), _options(args.option)
    method = _method(args)
    from hybridfl.merging import saved
    from hybridfl.merging.measured import Measured

    if args.out.suffix not in saved.SUFFIXES:
        problem = f"got '{args.out}': the suffix says how it is written. {nearest(args.out.suffix, saved.SUFFIXES)}"
        raise ConfigError("--out", problem)
    saved.check_writable(args.out)
    found = saved.read(_inputs(args))
    if args.out.exists() and any(args.out.samefile(path) for path in _inputs(args)):
        raise ConfigError("--out", f"got '{args.out}', which is one of the inputs; name another file.")
    models, base = found[: len(args.models)], found[-1] if args.base else None
    federation = None if args.on is None else _federation(args, models[0])

    measured = Measured(federation, models, args.examples or EXAMPLES) if federation else None
    aligned: list[Params] = []
    if args.method in ALIGNMENTS:
        aligned = _called(method, options, {"models": models}, measured)
        method, options = _located("mean"), {}

    def operator(models: list[Params], base: Params | None) -> Params:
        merged: Params = _called(method, options, {"models": models, "weights": weights, "base": base}, measured)
        return merged

    merged = saved.merge(operator, aligned or models, base, weights)
    if federation is not None:
        from hybridfl.merging.report import report

        named = dict(zip(map(str, args.models), models, strict=True))
        print(report(federation, named, f"{args.out} ({args.method})", merged, aligned) + "\n")
    saved.write(args.out, merged)
    numbers = sum(tensor.numel() for tensor in merged.values())
    print(f"wrote {args.out}: {args.method} of {len(models)}, {len(merged)} tensors of {numbers} numbers")
    return 0


def _federation(args: argparse.Namespace, model: Params) -> Federation:
    """Of the config of ``--on``, whose net must be the model's."""
    from hybridfl.merging.report import federation_of
    from hybridfl.merging.saved import check_fit

    federation = federation_of(args.on, args.config_dir)
    check_fit(model, {**federation.start.params, **federation.start.buffers}, str(args.models[0]), "the model of --on")
    return federation


def _inputs(args: argparse.Namespace) -> list[Path]:
    return [*args.models, *([args.base] if args.base else [])]


def _method(args: argparse.Namespace) -> Callable[..., Any]:
    """The function of ``--method``.

    Raises:
        ConfigError: there is no such method, or it does not take what was given, or needs what was not.
    """
    from hybridfl.build import signature_of

    if args.method not in {**METHODS, **ALIGNMENTS}:
        raise ConfigError("--method", f"got '{args.method}'. {nearest(args.method, {**METHODS, **ALIGNMENTS})}")
    method = _located(args.method)
    taken = {*signature_of(method)[0], *(["weights"] if args.method in ALIGNMENTS else [])}
    for name, where in GIVEN.items():
        if getattr(args, name) is not None and name not in taken:
            raise ConfigError(where.split()[0], f"{args.method} takes none; leave it out.")
    if "base" in taken and args.base is None:
        problem = (
            f"is needed: {args.method} merges what the models learned since they were one; name the file of that one."
        )
        raise ConfigError("--base", problem)
    asked = dict.fromkeys(what for name, what in MEASURED.items() if name in taken)
    if asked and args.on is None:
        problem = f"is needed: {args.method} looks at {' and '.join(asked)} of a config; name it as for train"
        raise ConfigError("--on", f"{problem}, such as --on dataset=fashion_mnist model=cnn.")
    if args.examples is not None and not taken & {"examples", "grams", "fishers", "score"}:
        raise ConfigError("--examples", f"{args.method} looks at none; leave it out.")
    if args.examples is not None and args.examples < 1:
        raise ConfigError("--examples", f"got {args.examples}: must be at least 1; nearest valid value: 1.")
    return method


def _located(name: str) -> Callable[..., Any]:
    from hybridfl.build import locate

    return locate({**METHODS, **ALIGNMENTS}[name], "--method")


def _called(
    method: Callable[..., Any], options: Mapping[str, Any], there: Mapping[str, Any], measured: Measured | None
) -> Any:
    """What a method makes of what is there; what must be measured is, once its options are known to be right."""
    from hybridfl.build import call, signature_of

    taken = signature_of(method)[0]
    asked = [name for name in MEASURED if name in taken]

    @functools.wraps(method)
    def complete(**arguments: Any) -> Any:
        return method(**arguments | {name: getattr(measured, name) for name in asked})

    context = {name: value for name, value in there.items() if name in taken} | dict.fromkeys(asked)
    try:
        return call(complete, options, "", context)
    except ConfigError as error:
        if error.key and error.key not in options:
            raise  # of the config of --on
        raise ConfigError(f"--option {error.key}" if error.key else "--method", error.problem) from error


def _options(texts: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ConfigError("--option", f"got '{text}': write it as key=value, such as density=0.3.")
        if name in GIVEN or name in MEASURED:
            raise ConfigError(f"--option {name}", f"is given as {GIVEN.get(name, '--on')}.")
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False, "null": None}.get(text, text)


def _weights(args: argparse.Namespace) -> list[float] | None:
    if args.weights is None:
        return None
    equal = ",".join([f"{1 / len(args.models):.3g}"] * len(args.models))
    try:
        weights = [float(text) for text in args.weights.split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(args.models) or not all(map(math.isfinite, weights)):
        raise ConfigError("--weights", f"got '{args.weights}': expected a number for each model, such as {equal}.")
    if args.method in ("mean", *ALIGNMENTS) and math.fsum(weights) <= 0:
        problem = f"got '{args.weights}', which sum to {math.fsum(weights):g}: expected more than 0, such as {equal}."
        raise ConfigError("--weights", problem)
    return weights
