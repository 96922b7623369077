"""``hybridfl merge``: files in, a file out, and every mistake heard before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import merge_command_helpers
import numpy as np
import pytest
import torch
from cli_helpers import SMALL_DATA, call
from merge_command_helpers import ON, loaded, saved
from torch import Tensor

from hybridfl import params as P
from hybridfl.build import locate, signature_of
from hybridfl.errors import ConfigError
from hybridfl.merge_command import ALIGNMENTS, GIVEN, MEASURED, METHODS
from hybridfl.merging.dare import dare
from hybridfl.merging.geometric_median import geometric_median
from hybridfl.merging.measured import Measured
from hybridfl.merging.saved import check_fit
from hybridfl.merging.slerp import slerp
from hybridfl.merging.ties import ties

_here = merge_command_helpers._here


def some(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in {"a.weight": (3, 4), "a.bias": (3,)}.items()}


@pytest.fixture
def three() -> list[str]:
    saved("base.pt", some(0))
    return [saved("a.safetensors", some(1)), saved("b.pt", some(2)), saved("c.safetensors", some(3))]


def wide(tensors: Mapping[str, Tensor]) -> P.Params:
    return {name: tensor.double() for name, tensor in sorted(tensors.items())}


def same(name: str, expected: Mapping[str, Tensor]) -> bool:
    """The file holds these numbers, rounded to its own precision."""
    found = loaded(name)
    return found.keys() == expected.keys() and all(torch.equal(t, expected[n].float()) for n, t in found.items())


# -- merging ---------------------------------------------------------------------------------------------------------


def test_the_mean_of_both_kinds_of_files_in_both_kinds(three: list[str]) -> None:
    mean = P.mean([wide(some(k)) for k in (1, 2, 3)])
    for out in ("mean.safetensors", "deep/mean.pt", "mean.pth"):
        answer = call("merge", *three, "-o", out)
        assert (answer.status, answer.err) == (0, "")
        assert answer.out == f"wrote {out}: mean of 3, 2 tensors of 15 numbers\n"
        assert same(out, mean)


def test_options_and_weights_reach_the_method(three: list[str]) -> None:
    base, models = wide(some(0)), [wide(some(k)) for k in (1, 2, 3)]
    line = ("--base", "base.pt", "--weights", "1,0.5,2", "-o", "out.safetensors")
    assert call("merge", *three, "--method", "ties", *line, "--option", "density=0.5", "scale=2").status == 0
    assert same("out.safetensors", ties(base, models, [1, 0.5, 2], 0.5, 2))
    assert call("merge", *three, "--method", "dare", *line, "--option", "drop=0.25", "--option", "seed=7").status == 0
    assert same("out.safetensors", dare(base, models, [1, 0.5, 2], 0.25, 1.0, 7))
    line = ("--base", "base.pt", "--method", "dare", "-o", "out.safetensors")
    assert call("merge", three[1], three[0], *line).status == 0, "a file that keeps its tensors in another order first"
    assert same("out.safetensors", dare(base, [models[1], models[0]]))
    assert call("merge", "--method=slerp", "-o", "out.pt", "--option", "t=1e-1", "--", *three[:2]).status == 0
    assert same("out.pt", slerp(models[:2], 0.1))


def test_models_far_from_the_others_are_left_out(three: list[str]) -> None:
    models = [wide(some(k)) for k in (1, 2, 3)]
    files = [*three, saved("far.pt", {name: 1e6 + t for name, t in some(4).items()}), saved("d.pt", some(5))]
    models += [wide({name: 1e6 + t for name, t in some(4).items()}), wide(some(5))]
    line = ("-o", "out.safetensors", "--method")
    assert call("merge", *files, *line, "median").status == 0
    stacked = {name: np.stack([model[name].numpy() for model in models]) for name in models[0]}
    assert same("out.safetensors", {name: torch.from_numpy(np.median(t, axis=0)) for name, t in stacked.items()})
    assert call("merge", *files, *line, "trimmed_mean", "--option", "trim=0.4").status == 0
    assert same("out.safetensors", {name: torch.from_numpy(np.median(t, axis=0)) for name, t in stacked.items()})
    assert call("merge", *files, *line, "krum", "--option", "byzantine=1", "keep=null").status == 0
    assert same("out.safetensors", P.mean([models[k] for k in (0, 1, 2, 4)]))
    options = ("--option", "iterations=3", "--weights", "1,2,3,4,5")
    assert call("merge", *files, *line, "geometric_median", *options).status == 0
    assert same("out.safetensors", geometric_median(models, [1, 2, 3, 4, 5], 3))


def test_parameters_that_want_gradients_are_merged_as_numbers() -> None:
    saved("a.pt", {"w": torch.nn.Parameter(torch.ones(2))})
    saved("b.pt", {"w": torch.nn.Parameter(torch.zeros(2))})
    assert call("merge", "a.pt", "b.pt", "-o", "out.pt").status == 0
    assert not loaded("out.pt")["w"].requires_grad
    assert loaded("out.pt")["w"].tolist() == [0.5, 0.5]


def test_task_negation_takes_one_model(three: list[str]) -> None:
    line = ("--method", "task_arithmetic", "--base", "base.pt", "--weights=-1", "-o", "forgotten.pt")
    assert call("merge", three[0], *line).status == 0
    base, model = wide(some(0)), wide(some(1))
    assert same("forgotten.pt", {name: 2 * base[name] - model[name] for name in base})


def test_numbers_are_added_in_double_and_kept_in_the_first_files_type() -> None:
    """1 + 2⁻¹¹ in half precision is 1, but the mean of three such updates is not."""
    for k in range(4):
        saved(f"{k}.pt", {"w": torch.tensor([1.0, 2048.0 + 2 * k], dtype=torch.float16 if k == 0 else torch.float32)})
    assert call("merge", "0.pt", "1.pt", "2.pt", "3.pt", "-o", "out.pt").status == 0
    out = loaded("out.pt")["w"]
    assert out.dtype == torch.float16
    assert out.tolist() == [1.0, 2052.0]  # 2051 to the nearest even number


def test_statistics_are_no_task_vectors_and_counters_take_the_largest(three: list[str]) -> None:
    def batch_norm(mean: float, var: float, seen: int) -> dict[str, Tensor]:
        floats = {
            "n.weight": torch.ones(1),
            "n.running_mean": torch.tensor([mean]),
            "n.running_var": torch.tensor([var]),
        }
        return {**floats, "n.num_batches_tracked": torch.tensor(seen)}

    files = [saved(f"{k}.pt", batch_norm(float(k), 1.0 + k, 10 - k)) for k in range(3)]
    line = ("--method", "task_arithmetic", "-o", "out.pt", "--base", files[2])
    assert call("merge", *files[:2], *line, "--weights", "3,1").status == 0
    out = loaded("out.pt")
    assert [out["n.running_mean"].item(), out["n.running_var"].item()] == [0.25, 1.25]
    assert out["n.num_batches_tracked"].item() == 10
    assert call("merge", *files[:2], *line, "--weights=3,-1").status == 0
    assert loaded("out.pt")["n.running_var"].item() == 1.5
    assert call("merge", *files[:2], "--method", "slerp", "--option", "t=0", "-o", "out.pt").status == 0
    assert loaded("out.pt")["n.running_var"].item() == 1.0


@pytest.mark.parametrize("name", [*METHODS, *ALIGNMENTS])
def test_every_method_takes_models_and_has_a_default_for_its_options(name: str) -> None:
    parameters, _ = signature_of(locate({**METHODS, **ALIGNMENTS}[name], name))
    assert "models" in parameters
    assert all(p.default is not p.empty for n, p in parameters.items() if n not in {**GIVEN, **MEASURED})
    assert all(isinstance(getattr(Measured, n), property) for n in MEASURED)
    assert name in call("merge", "--help").out


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (["--method", "tie"], r"--method: got 'tie'\. Did you mean 'ties'\?"),
        (["--method", "ties"], r"--base: is needed: ties merges"),
        (["--base", "base.pt"], r"--base: mean takes none"),
        (["--method", "slerp", "--weights", "1,2,3"], r"--weights: slerp takes none"),
        (["--method", "slerp"], r"--method: slerp refuses its options: .* got 3\."),
        (["--weights", "1,2"], r"--weights: got '1,2': expected a number for each model, such as 0\.333,0\.333,0\.333"),
        (["--weights", "1,x,2"], r"--weights: got '1,x,2'"),
        (["--weights", "1,inf,2"], r"--weights: got '1,inf,2'"),
        (["--weights=-1,0,1"], r"--weights: got '-1,0,1', which sum to 0: .* such as 0\.333"),
        (["--option", "t"], r"--option: got 't': write it as key=value"),
        (["--option", "weights=1"], r"--option weights: is given as --weights"),
        (["--option", "t=1"], r"--option t: unknown key"),
        (["--method", "ties", "--base", "base.pt", "--option", "densty=1"], r"--option densty: .* Did you mean 'density'"),
        (["--method", "ties", "--base", "base.pt", "--option", "density=x"], r"--option density: got 'x': expected a number"),
        (["--method", "dare", "--base", "base.pt", "--option", "drop=1"], r"--option drop: got 1: must be below 1"),
        (["--method", "dare", "--base", "base.pt", "--option", "scale=inf"], r"--option scale: got inf: must be finite"),
        (["--method", "dare", "--base", "bas.pt"], r"bas\.pt: there is no such file\. Did you mean 'base\.pt'\?"),
        (["-o", "out.safetensor"], r"--out: .* Did you mean '\.safetensors'\?"),
        (["-o", "b.pt"], r"--out: got 'b\.pt', which is one of the inputs"),
        (["nowhere/d.pt"], r"nowhere/d\.pt: there is no such file\. Give a state dict"),
        (["notes.pt"], r"notes\.pt: cannot read 'notes\.pt' as weights"),
        (["list.pt"], r"list\.pt: 'list\.pt' holds no name"),
        (["other.pt"], r"other\.pt: does not fit a\.safetensors: it lacks a\.bias; only it has b; of other shapes are "
                       r"a\.weight \(4, 3\) instead of \(3, 4\)\."),
        (["--method", "weight_matching"], r"--on: is needed: weight_matching looks at the net and the form of its inputs of"),
        (["--method", "activation_matching"], r"--on: is needed: activation_matching looks at the net and training examples"),
        (["--method", "regmean"], r"--on: is needed: regmean looks at training examples of a config; name it as for train"),
        (["--method", "weight_matching", "--base", "base.pt", *ON], r"--base: weight_matching takes none"),
        (["--method", "median", "--weights", "1,2,3"], r"--weights: median takes none"),
        (["--method", "krum", "--option", "byzantine=1"], r"--method: krum refuses .* of 3 .*; nearest valid value: 0\."),
        (["--method", "trimmed_mean", "--option", "trim=0.5"], r"--option trim: got 0\.5: must be below 0\.5"),
        (["--method", "greedy_soup"], r"--on: is needed: greedy_soup looks at training examples"),
        (["--examples", "5"], r"--examples: mean looks at none"),
        (["--method", "weight_matching", "--examples", "5", *ON], r"--examples: weight_matching looks at none"),
        (["--method", "fisher", "--examples", "0", *ON], r"--examples: got 0: must be at least 1; nearest valid value: 1\."),
        (["--option", "fishers=1"], r"--option fishers: is given as --on"),
        (["--on", "model.hiden=3"], r"model\.hiden: unknown key"),
        (["--on", *SMALL_DATA], r"a\.safetensors: does not fit the model of --on: it lacks body\.1\.weight"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_nothing_is_written(three: list[str], line: list[str], problem: str) -> None:
    Path("notes.pt").write_text("not a model")
    torch.save([1, 2], "list.pt")
    saved("other.pt", {"a.weight": torch.zeros(4, 3), "b": torch.zeros(1)})
    before = {path: path.read_bytes() for path in Path().iterdir()}
    answer = call("merge", "-o", "out.pt", *three, *line)
    assert answer.status == 2
    assert re.match(f"hybridfl: {problem}", answer.err), answer.err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_only_the_first_tensors_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"it lacks 0, 1, 2, 3, 4 and 3 more\.$"):
        check_fit({}, {str(k): torch.zeros(1) for k in range(8)}, "one", "other")
