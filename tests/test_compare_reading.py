"""Reading many run folders: what is shared between them and what is parsed late changes no number."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from compare_helpers import HEADER, Outputs, table

from hybridfl.errors import DataError
from hybridfl.finding import find_runs
from hybridfl.runs import read_run

CONFIGS = {
    "plain": "seed: 1\nmethod:\n  name: fedavg\n  mu: 0.1\n",
    "a list that is not indented": "hidden:\n- 64\n- 32\nseed: 1\n",
    "comments and blank lines": "# made by hand\n\nseed: 1  # the first\n# another\nmethod: {name: fedavg}\n",
    "an anchor of another section": "clients: &all\n  number: 5\nserver: *all\nseed: 1\n",
    "a bracket closed at the margin": "hidden: [64,\n32]\nseed: 1\n",
    "a text over several lines": "overrides: 'a\n  b: c'\nseed: 1\nnote: |\n  one: 1\n  two\n",
    "a key twice": "seed: 1\nmethod: {name: fedavg}\nseed: 2\n",
    "a quoted key": "'seed': 1\nmethod: {name: fedavg}\n",
    "one line": "{seed: 1, method: {name: fedavg}}",
    "nothing": "",
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_a_config_in_sections_is_the_whole_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    wanted = yaml.safe_load(text) or {}
    known: dict[str, object] = {}
    assert [read_run(tmp_path, known=known).config for _ in range(2)] == [wanted, wanted]
    assert list(read_run(tmp_path).config) == list(wanted)


@pytest.mark.parametrize("text", ["seed: 1\nmethod: [fedavg\n", "seed: 1\nfedavg\n", "- seed\n", "a: *b\n"])
def test_a_broken_config_is_no_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=r"config\.yaml"):
        read_run(tmp_path)


def test_sections_that_runs_share_are_parsed_once(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        outputs.run(f"a{seed}", "fedavg", seed, [0.5], partitioning__seed=None)
    parsed: list[str] = []
    load = yaml.load

    def counted(text: str, loader: type[yaml.SafeLoader]) -> object:
        parsed.append(text)
        return load(text, loader)

    monkeypatch.setattr(yaml, "load", counted)
    assert [run.value("seed") for run in find_runs([outputs.path])] == [*range(5)]
    assert sum(text.startswith("method:") for text in parsed) == 1
    assert len(parsed) == 3 + 3 * 5  # seed, digest and overrides are each run's own


def test_metrics_with_quotes_gaps_and_half_a_line(outputs: Outputs) -> None:
    folder = outputs.run("a", "fedavg", 1, [0.5], status="running")
    lines = [
        HEADER,
        '1,"global/domain=a,b",0.25,,,,9,1e6,2e6,,,,,',
        "1,global,0.5,,,,9,1e6,2e6,,,,,",
        "2,global,,nonsense,,,9,3e6,,,,,,",
        '2,"global/domain=a,b",0.75,,,,9,3e6,4e6,5e6,,,,',
        "3,global,0.9",
        "",
    ]
    (folder / "metrics.csv").write_text("\n".join(lines))
    run = read_run(folder)
    assert list(run.curves) == ["global/domain=a,b", "global"]
    domain, whole = run.curves.values()
    assert (domain.rounds, domain.column("accuracy"), domain.bytes) == ([1, 2], [0.25, 0.75], [3e6, 12e6])
    assert (whole.rounds, whole.last_round, whole.bytes, *whole.spent("bytes", 1)) == ([1, 2], 2, [3e6, 3e6], 3e6)
    assert whole.column("examples", 1) == [9.0]
    for name, last, wanted in (("accuracy", None, [0.5, math.nan]), ("loss", 1, [math.nan]), ("none", 1, [math.nan])):
        assert whole.column(name, last) == pytest.approx(wanted, nan_ok=True)
    assert len(whole.column("none")) == 2
    assert run.bytes == 12e6


def test_a_window_longer_than_the_run_is_the_run(outputs: Outputs) -> None:
    outputs.run("a", "fedavg", 1, [0.5, 0.7])
    assert float(table(outputs.path, at="mean10")[0]["mean"]) == pytest.approx(0.6)
