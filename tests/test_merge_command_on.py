"""``hybridfl merge --on``: scores and barriers, and methods that look at a config's net and examples."""

from __future__ import annotations

from collections.abc import Mapping

import merge_command_helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_helpers import SMALL_DATA, Answer, call
from helpers import close
from merge_command_helpers import ON, loaded, saved
from torch import Tensor

from hybridfl import params as P
from hybridfl.config import Composer
from hybridfl.federation import Federation
from hybridfl.local import predict
from hybridfl.merge_command import ALIGNMENTS, EXAMPLES
from hybridfl.merging.fisher_mean import fisher_mean
from hybridfl.merging.matching import fixed_points
from hybridfl.merging.measured import Measured
from hybridfl.merging.permutation import inverse, permutation_spec, permuted, permuted_tensors, random_permutations
from hybridfl.merging.regmean import regmean
from hybridfl.models import batch_norm
from hybridfl.plan import make_plan
from hybridfl.rng import stream
from hybridfl.types import Model

_here = merge_command_helpers._here


# -- scores and barriers ---------------------------------------------------------------------------------------------


def trained_on(federation: Federation) -> dict[str, Tensor]:
    """Of a net without BatchNorm."""
    net, bench = federation.net, federation.bench
    for _ in range(100):
        grads = torch.autograd.grad(F.cross_entropy(net(bench.x), bench.y), list(net.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(net.parameters(), grads, strict=True):
                parameter -= 0.3 * grad
    return P.clone(net.state_dict())


def test_model_is_short_for_its_override() -> None:
    line = (*SMALL_DATA, "baseline=fedavg", "model=mlp")
    with Composer() as composer:
        start = make_plan(composer.compose(line)).federation.start
    files = [saved(f"{k}.pt", start.params) for k in "ab"]
    short = call("merge", *files, "-o", "c.pt", "--on", *SMALL_DATA, "--model", "mlp")
    whole = call("merge", *files, "-o", "c.pt", "--on", *SMALL_DATA, "model=mlp")
    assert short.status == 0, short.both
    assert short.out == whole.out
    assert "barrier" in short.out
    wrong = call("merge", *files, "-o", "c.pt", "--model", "mpl")
    assert wrong.status == 2
    assert "Did you mean 'mlp'?" in wrong.err


def test_scores_and_barriers_are_those_of_plain_torch() -> None:
    """A trained net, the same with its hidden units turned around, and one of random weights."""
    with Composer() as composer:
        federation = make_plan(composer.compose(["baseline=fedavg", *ON[1:]])).federation
    trained = trained_on(federation)
    turned = {name: t.flip(1 if name == "head.weight" else 0) for name, t in trained.items() if name != "head.bias"}
    models = [trained, turned | {"head.bias": trained["head.bias"]}, federation.start.params]
    files = [saved(f"{k}.safetensors", model) for k, model in enumerate(models)]
    answer = call("merge", *files, "-o", "mean.safetensors", *ON)
    assert answer.status == 0, answer.both
    rows = [line.split() for line in answer.out.splitlines()]

    def score(model: Mapping[str, Tensor]) -> tuple[float, float]:
        federation.net.load_state_dict(dict(model))
        x, y = federation.test
        with torch.no_grad():
            logits = federation.net.eval()(x)
        return float((logits.argmax(1) == y).float().mean()), float(F.cross_entropy(logits, y))

    for file, model in [*zip(files, models, strict=True), ("mean.safetensors", loaded("mean.safetensors"))]:
        (row,) = (row for row in rows if row[:1] == [file] and row[1] not in files)
        accuracy, loss = score(model)
        assert float(row[-2]) == pytest.approx(100 * accuracy, abs=0.006)
        assert float(row[-1]) == pytest.approx(loss, rel=1e-5)
    found = {(row[0], row[1]): (float(row[2]), float(row[3])) for row in rows if len(row) == 4 and row[1] in files}
    assert set(found) == {(files[0], files[1]), (files[0], files[2]), (files[1], files[2])}
    for (one, other), (height, at) in found.items():
        a, b = loaded(one), loaded(other)
        path = [score(P.add(a, P.subtract(b, a), t / 10))[1] for t in range(11)]
        above = [loss - path[0] * (1 - t / 10) - path[-1] * t / 10 for t, loss in enumerate(path)]
        assert height == pytest.approx(max(above), rel=1e-4, abs=1e-6)
        assert at == pytest.approx(above.index(max(above)) / 10)
    assert found[files[0], files[1]][0] > 0.1
    assert "On the 100 test examples of synthetic" in answer.out
    assert answer.out.splitlines()[-1].startswith("wrote mean.safetensors: mean of 3")


# -- methods that look at a config's net and examples -------------------------------------------------------------------


DEEP = (*SMALL_DATA, "dataset.shape=[1,8,8]", "model=cnn", "model.channels=[4,8]", "model.hidden=8", "dtype=float64")
NORMED = (
    *SMALL_DATA,
    "dataset.shape=[1,8,8]",
    "model=resnet20",
    "model.norm=batch",
    "model.width=0.125",
    "dtype=float64",
)


def federation_on(*line: str) -> Federation:
    with Composer() as composer:
        return make_plan(composer.compose(["baseline=fedavg", *line])).federation


def random_model(federation: Federation, seed: int) -> Model:
    """No two units alike; statistics of BatchNorm are those on the training examples."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        n: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        for n, t in federation.start.params.items()
    }
    return batch_norm.reestimated(federation.net, Model(drawn, federation.start.buffers), [federation.bench.x])


@pytest.mark.parametrize("method", ALIGNMENTS)
@pytest.mark.parametrize("line", [DEEP, NORMED], ids=["cnn", "batch norm"])
def test_a_permuted_clone_merges_to_the_function_it_was(method: str, line: tuple[str, ...]) -> None:
    federation = federation_on(*line)
    x = federation.test[0]
    model = random_model(federation, 0)
    spec = permutation_spec(federation.net, x)
    hidden = random_permutations(spec, np.random.default_rng(0))
    assert fixed_points(hidden) < 0.5
    clone = permuted(model, spec, hidden)
    files = [saved(f"{k}.safetensors", {**m.params, **m.buffers}) for k, m in enumerate([model, clone])]
    answer = call("merge", *files, "-o", "out.safetensors", "--method", method, "--on", *line)
    assert answer.status == 0, answer.both
    merged = loaded("out.safetensors")
    found = predict(federation.net, Model(*({n: merged[n] for n in part} for part in model)), x, 1000)
    expected = predict(federation.net, model, x, 1000)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert expected.std(0).min() > 1e-3  # the net is not dead
    (row,) = (row for row in map(str.split, answer.out.splitlines()) if row[:2] == files)
    assert abs(float(row[4])) < 1e-9
    assert call("merge", *files, "-o", "out.pt").status == 0
    unaligned = loaded("out.pt")
    other = predict(federation.net, Model(*({n: unaligned[n] for n in part} for part in model)), x, 1000)
    assert (other - expected).abs().max() > 1e-2


def test_models_are_aligned_to_the_first_and_weighed_and_barriers_are_told() -> None:
    line = (*SMALL_DATA, "model.hidden=[8]", "dtype=float64")
    federation = federation_on(*line)
    models = [trained_on(federation), *(random_model(federation, seed).params for seed in range(2))]
    spec = permutation_spec(federation.net, federation.test[0])
    drawn = [random_permutations(spec, np.random.default_rng(seed)) for seed in range(2)]
    # Close to the first, in places of their own: which unit is which has one answer.
    near = [models[0], *(P.add(models[0], m, 0.01) for m in models[1:])]
    files = [saved("0.pt", near[0])]
    files += [saved(f"{k + 1}.pt", permuted_tensors(near[k + 1], spec, p)) for k, p in enumerate(drawn)]
    options = ("--method", "weight_matching", "--option", "seed=3", "--weights", "1,2,5")
    answer = call("merge", *files, "-o", "out.pt", *options, "--on", *line)
    assert answer.status == 0, answer.both
    assert close(loaded("out.pt"), P.mean(near, [1, 2, 5]))
    assert inverse(drawn[0])[0].tolist() != list(range(8))
    back = [saved(f"near{k}.pt", m) for k, m in enumerate(near)]
    plain = call("merge", *back, "-o", "out.pt", "--weights", "1,2,5", "--on", *line)

    def barriers(answer: Answer, names: list[str]) -> dict[tuple[str, str], list[str]]:
        rows = (text.split() for text in answer.out.splitlines())
        return {(row[0], row[1]): row[2:] for row in rows if len(row) >= 4 and set(row[:2]) <= set(names)}

    found, expected = barriers(answer, files), barriers(plain, back)
    assert "once aligned" in answer.out
    assert "once aligned" not in plain.out
    assert len(found) == len(expected) == 3
    for numbers, aligned in zip(found.values(), expected.values(), strict=True):
        assert float(numbers[2]) == pytest.approx(float(aligned[0]), rel=1e-4, abs=1e-9)
        assert float(numbers[0]) > 0.05 > float(numbers[2])


@pytest.mark.parametrize(("examples", "most"), [(["--examples", "30"], 30), ([], EXAMPLES)])
def test_statistics_are_of_the_configs_training_examples(examples: list[str], most: int) -> None:
    line = (*ON[1:], "dtype=float64")
    federation = federation_on(*line)
    net = federation.net
    models = [random_model(federation, seed).params for seed in range(2)]
    files = [saved(f"{k}.pt", model) for k, model in enumerate(models)]
    order = stream(federation.seed, "examples of merging").permutation(200)[:most]
    x, y = (t[torch.from_numpy(order)] for t in (federation.bench.x, federation.bench.y))
    grams, fishers = [], []
    for model in models:
        h = x.flatten(1)
        after = F.relu(h @ model["body.1.weight"].T + model["body.1.bias"])
        grams.append({"body.1": h.T @ h, "head": after.T @ after})
        losses = torch.func.vmap(
            torch.func.grad(
                lambda p, one, label: F.cross_entropy(torch.func.functional_call(net, p, (one[None],)), label[None])
            ),
            (None, 0, 0),
        )(model, x, y)
        fishers.append({name: grad.square().mean(0) for name, grad in losses.items()})
    weighted = ("-o", "out.pt", "--weights", "1,3", *examples, "--on", *line)
    assert call("merge", *files, "--method", "regmean", "--option", "alpha=0.7", *weighted).status == 0
    assert close(loaded("out.pt"), regmean(models, grams, [1, 3], 0.7), 1e-8)
    assert call("merge", *files, "--method", "fisher", "--option", "floor=1e-3", *weighted).status == 0
    assert close(loaded("out.pt"), fisher_mean(models, fishers, [1, 3], 1e-3))
    assert not close(loaded("out.pt"), P.mean(models, [1, 3]), 1e-4)


@pytest.mark.parametrize("line", [(*ON[1:], "dtype=float64"), NORMED], ids=["mlp", "batch norm"])
def test_a_soup_is_tasted_on_the_configs_training_examples(line: tuple[str, ...]) -> None:
    federation = federation_on(*line)
    order = torch.from_numpy(stream(federation.seed, "examples of merging").permutation(200)[:60])
    x, y = (t[order] for t in (federation.bench.x, federation.bench.y))
    models = [random_model(federation, seed) for seed in range(4)]
    files = [saved(f"{k}.pt", {**model.params, **model.buffers}) for k, model in enumerate(models)]

    def score(model: Model) -> float:
        return float((predict(federation.net, model, x, 1000).argmax(1) == y).double().mean())

    def mean(places: list[int]) -> Model:
        return Model(*(P.mean([models[k][part] for k in places]) for part in (0, 1)))

    first, *others = sorted(range(4), key=lambda k: -score(models[k]))
    soup, best = [first], score(models[first])
    for k in others:
        if (found := score(mean([*soup, k]))) >= best:
            soup, best = [*soup, k], found
    answer = call("merge", *files, "-o", "out.pt", "--method", "greedy_soup", "--examples", "60", "--on", *line)
    assert answer.status == 0, answer.both
    expected = mean(soup)
    assert close(loaded("out.pt"), {**expected.params, **expected.buffers})


def test_examples_without_labels_or_of_another_set_are_not_looked_at() -> None:
    other = ("server_data=dataset", "dataset@server_data.dataset=synthetic", "server_data.dataset.seed=1")
    federation = federation_on(*SMALL_DATA, *other)
    assert len(federation.bench.x) > 200
    x = Measured(federation, [], 10_000).examples
    assert sorted(x.flatten(1).sum(1).tolist()) == sorted(federation.bench.x[:200].flatten(1).sum(1).tolist())
    unlabelled = federation_on(*SMALL_DATA, "server_data.labelled=false", "server_data.examples=30")
    assert len(Measured(unlabelled, [], 10_000).examples) == 170


@pytest.mark.parametrize("method", ALIGNMENTS)
def test_a_net_that_cannot_be_permuted_is_named(method: str) -> None:
    line = (*SMALL_DATA, "dataset.shape=[1,8,8]", "model=vit")
    saved("a.pt", {**federation_on(*line).start.params})
    answer = call("merge", "a.pt", "a.pt", "-o", "out.pt", "--method", method, "--on", *line)
    assert answer.status == 2
    assert answer.err.startswith("hybridfl: model: the net uses 'positions'"), answer.err
    wrong = call("merge", "a.pt", "-o", "out.pt", "--method", method, "--option", "sed=1", "--on", *line)
    assert wrong.err.startswith("hybridfl: --option sed: unknown key"), wrong.err


@pytest.mark.parametrize("method", ALIGNMENTS)
def test_a_net_without_hidden_units_is_averaged(method: str) -> None:
    line = (*SMALL_DATA, "model.hidden=[]", "dtype=float64")
    federation = federation_on(*line)
    models = [random_model(federation, seed).params for seed in range(2)]
    files = [saved(f"{k}.pt", model) for k, model in enumerate(models)]
    assert call("merge", *files, "-o", "out.pt", "--method", method, "--on", *line).status == 0
    assert close(loaded("out.pt"), P.mean(models))


def test_a_single_model_has_no_barrier() -> None:
    with Composer() as composer:
        start = make_plan(composer.compose(["baseline=fedavg", *ON[1:]])).federation.start
    saved("a.pt", start.params)
    answer = call("merge", "a.pt", "-o", "b.pt", *ON, "server_data=none")
    assert answer.status == 0, answer.both
    assert "barrier" not in answer.out.lower()
    first, second = (line.split() for line in answer.out.splitlines() if line.startswith((" a.pt", " b.pt")))
    assert first[-2:] == second[-2:]
