"""``hybridfl merge``: saved models into one, and with ``--on`` how good they are and what lies between them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridfl.errors import ConfigError, nearest

if TYPE_CHECKING:
    from hybridfl.params import Params

METHODS = {
    "mean": "hybridfl.merging.weighted_mean.weighted_mean",
    "task_arithmetic": "hybridfl.merging.task_arithmetic.task_arithmetic",
    "ties": "hybridfl.merging.ties.ties",
    "dare": "hybridfl.merging.dare.dare",
    "slerp": "hybridfl.merging.slerp.slerp",
}
"""Name → function. Its signature is the schema: ``models``, ``weights`` and ``base``, where it has them, come from the
command line, and its other arguments are the options."""

GIVEN = {"models": "FILE …", "weights": "--weights", "base": "--base FILE"}

EPILOG = f"""\
methods: {", ".join(METHODS)}
  task_arithmetic, ties and dare merge what the models learned since the base they were trained from

  hybridfl merge a.safetensors b.safetensors -o mean.safetensors
  hybridfl merge a.pt b.pt c.pt --base start.pt --method ties --option density=0.3 -o ties.safetensors
  hybridfl merge a.pt b.pt -o mean.pt --on dataset=fashion_mnist model=cnn
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
    parser.add_argument(
        "--on",
        nargs="*",
        metavar="key=value",
        help="score inputs and result, and the loss barriers between the inputs, on the test part of this config: "
        "overrides as of train",
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with config groups of your own")


def run(args: argparse.Namespace) -> int:
    """Writes the merged model, prints what was asked for and returns the exit status."""
    weights = _weights(args)
    operator = _operator(args, weights)
    from hybridfl.merging import saved

    if args.out.suffix not in saved.SUFFIXES:
        problem = f"got '{args.out}': the suffix says how it is written. {nearest(args.out.suffix, saved.SUFFIXES)}"
        raise ConfigError("--out", problem)
    found = saved.read(_inputs(args))
    if args.out.exists() and any(args.out.samefile(path) for path in _inputs(args)):
        raise ConfigError("--out", f"got '{args.out}', which is one of the inputs; name another file.")
    models, base = found[: len(args.models)], found[-1] if args.base else None
    merged = saved.merge(operator, models, base, weights)
    if args.on is not None:
        from hybridfl.merging.report import report

        named = dict(zip(map(str, args.models), models, strict=True))
        print(report(named, f"{args.out} ({args.method})", merged, args.on, args.config_dir) + "\n")
    saved.write(args.out, merged)
    numbers = sum(tensor.numel() for tensor in merged.values())
    print(f"wrote {args.out}: {args.method} of {len(models)}, {len(merged)} tensors of {numbers} numbers")
    return 0


def _inputs(args: argparse.Namespace) -> list[Path]:
    return [*args.models, *([args.base] if args.base else [])]


def _operator(args: argparse.Namespace, weights: list[float] | None) -> Callable[[list[Params], Params | None], Params]:
    """The method with its options, which are checked when it is called.

    Raises:
        ConfigError: there is no such method, or it does not take what was given.
    """
    from hybridfl.build import call, locate, signature_of

    if args.method not in METHODS:
        raise ConfigError("--method", f"got '{args.method}'. {nearest(args.method, METHODS)}")
    method = locate(METHODS[args.method], "--method")
    taken = signature_of(method)[0]
    for name, where in GIVEN.items():
        if getattr(args, name) is not None and name not in taken:
            raise ConfigError(where.split()[0], f"{args.method} takes none; leave it out.")
    if "base" in taken and args.base is None:
        problem = (
            f"is needed: {args.method} merges what the models learned since they were one; name the file of that one."
        )
        raise ConfigError("--base", problem)
    options = _options(args.option)

    def operator(models: list[Params], base: Params | None) -> Params:
        there = {"models": models, "weights": weights, "base": base}
        try:
            merged: Params = call(method, options, "", {name: there[name] for name in GIVEN if name in taken})
        except ConfigError as error:
            raise ConfigError(f"--option {error.key}" if error.key else "--method", error.problem) from error
        return merged

    return operator


def _options(texts: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ConfigError("--option", f"got '{text}': write it as key=value, such as density=0.3.")
        if name in GIVEN:
            raise ConfigError(f"--option {name}", f"is given as {GIVEN[name]}.")
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
    try:
        weights = [float(text) for text in args.weights.split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(args.models) or not all(map(math.isfinite, weights)):
        equal = ",".join([f"{1 / len(args.models):.3g}"] * len(args.models))
        raise ConfigError("--weights", f"got '{args.weights}': expected a number for each model, such as {equal}.")
    return weights
