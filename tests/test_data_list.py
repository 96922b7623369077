"""``hybridfl data list``, and names that are no data sets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import data_command_helpers
import numpy as np
import pytest
from cli_helpers import call
from data_command_helpers import NODES, TINY, Site, get, idx, imported

from hybridfl import data_command
from hybridfl.config import choices
from hybridfl.data.idx import FILES, MNIST

site = data_command_helpers.site
users = data_command_helpers.users
_alone = data_command_helpers._alone


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mnits", r"mnits: unknown data set\. Did you mean 'mnist'\? Valid: chars74k_fonts, "),
        ("digits", "digits: there is nothing to fetch, it needs no files."),
        (
            "mnist_m",
            "mnist_m: cannot be fetched. Its authors .* Put mnist_m.npz with the arrays x_train, .* in root/mnist_m,",
        ),
        (
            "chars74k_street",
            "chars74k_street: cannot be fetched. The original .* Put street_digits.npz with the arrays",
        ),
        ("femnist_digits", "femnist_digits: cannot be fetched. LEAF .* Put femnist_digits.npz with the arrays"),
        ("pacs", "pacs: cannot be fetched. Its images, .* Put a folder or zip of images for every domain in root/pacs"),
        ("image_folder", "image_folder: cannot be fetched. The images are your own. .* for every class in root/images"),
        ("unstated", "unstated: cannot be fetched. Its reader names no public files. FileNotFoundError: "),
        ("generated", "generated: cannot be fetched. Its reader names no public files. It is at hand below root."),
        (
            "wrong_list",
            r"dataset._target_: WrongList.downloads is \['https://example.org'\], expected a tuple of Download.",
        ),
    ],
)
def test_a_name_that_cannot_be_fetched_is_refused_before_any_download(users: Site, name: str, problem: str) -> None:
    answer = get("mnist", name, "--config-dir", "own", status=2)
    assert re.match(f"hybridfl: {problem}", answer.err), answer.err
    assert (users.asked, Path("root").exists()) == ([], False)


def test_a_mirror_that_cannot_serve(site: Site) -> None:
    answer = get("mnist", "--mirror", "ftp://example.org", status=2)
    assert answer.err.startswith("hybridfl: --mirror: got 'ftp://example.org': expected an address that begins with")
    answer = get("mnist", "fashion_mnist", "--mirror", site.address, status=2)
    assert answer.err == (
        f"hybridfl: --mirror: mnist and fashion_mnist have different files named {FILES[0]}; fetch one after the other.\n"
    )
    assert site.asked == []


# -- the list --------------------------------------------------------------------------------------------------------


def listed(*arguments: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The table by name and column, and the lines below it."""
    answer = call("data", "list", *arguments)
    assert (answer.status, answer.err) == (0, "")
    return parsed(answer.out)


def parsed(text: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    first, empty, header, *lines = text.splitlines()
    assert (first.startswith("data root: "), empty) == (True, "")
    end = lines.index("") if "" in lines else len(lines)
    columns = re.split(r" {2,}", header)
    rows = [dict(zip(columns, re.split(r" {2,}", line), strict=True)) for line in lines[:end]]
    return {row["name"]: row for row in rows}, lines[end + 1 :]


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Fewer choices, as composing each takes a while."""
    chosen = data_command.choices
    monkeypatch.setattr(
        data_command, "choices", lambda group, extra=None: {n: f for n, f in chosen(group, extra).items() if n in names}
    )


def test_a_list_of_nothing_needs_no_torch_and_no_network() -> None:
    modules, out = imported("{'torch', 'pandas', 'sklearn', 'pooch', 'requests', 'rich'}", ["data", "list"])
    assert modules == ""
    table, below = parsed(out)
    assert list(table) == list(choices("dataset"))
    assert below == []
    assert {name for name, row in table.items() if row["state"] == "built in"} == {"digits", "domains", "synthetic"}
    assert {row["state"] for row in table.values()} == {"missing", "built in"}
    assert {name for name, row in table.items() if row["fetch"] == "yes"} == {
        "mnist", "fashion_mnist", "cifar10", "cifar100", "usps",
    }  # fmt: skip
    assert {row["licence"] for row in table.values()}.isdisjoint({"unknown", "–"})
    expected = {"train": "1,352", "test": "445", "image": "1x8x8", "classes": "10", "size": "–", "fetch": "–"}
    assert expected.items() <= table["digits"].items()
    assert (
        table["mnist"].items()
        >= dict.fromkeys(("train", "test", "image", "classes", "size", "fingerprint"), "–").items()
    )
    assert not Path("root").exists()


def test_what_is_there_is_listed_with_its_numbers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "mnist", "fashion_mnist")
    get("mnist")
    monkeypatch.setenv("HYBRIDFL_DATA", "root")
    table, below = listed()
    found = MNIST().load(Path("root"))
    size = sum(map(len, TINY.values()))
    assert table["mnist"] == {
        "name": "mnist", "state": "present", "train": "6", "test": "4", "image": "1x28x28", "classes": "10",
        "size": f"{size / 1e6:.1f} MB", "fingerprint": found.fingerprint, "fetch": "yes", "licence": "CC BY-SA 3.0",
    }  # fmt: skip
    assert (table["fashion_mnist"]["state"], below) == ("missing", [])


def test_the_data_root_is_that_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, "digits")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HYBRIDFL_DATA", raising=False)
    assert call("data", "list").out.startswith(f"data root: {tmp_path}/.cache/hybridfl\n")
    monkeypatch.setenv("HYBRIDFL_DATA", "there")
    assert call("data", "list").out.startswith("data root: there\n")
    assert call("data", "list", "--data-root", "~/x").out.startswith(f"data root: {tmp_path}/x\n")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda file: file.write_bytes(TINY[FILES[2]][:-20]), "truncated, the packed stream ends too early"),
        (lambda file: file.write_bytes(b"something else"), "cannot be read"),
        (lambda file: file.write_bytes(idx(np.ones(99, np.uint8))), "magic number 2049, expected 2051"),
        (lambda file: file.unlink(), "not found"),
    ],
)
def test_a_broken_set_is_told_and_does_not_stop_the_list(
    site: Site, monkeypatch: pytest.MonkeyPatch, damage: Any, problem: str
) -> None:
    only(monkeypatch, "mnist", "usps")
    get("mnist")
    damage(Path("root/mnist") / FILES[2])
    table, below = listed("--data-root", "root")
    assert (table["mnist"]["state"], table["mnist"]["train"], table["usps"]["state"]) == ("broken", "–", "missing")
    assert table["mnist"]["size"].endswith(" MB")
    assert len(below) == 1
    assert below[0].startswith(f"mnist: root/mnist/{FILES[2]}: {problem}")


def test_a_users_sets_are_listed_whatever_they_do(users: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, *NODES)
    table, below = listed("--data-root", "root", "--config-dir", "own")
    assert {name: (row["state"], row["fetch"], row["licence"]) for name, row in table.items()} == {
        "generated": ("present", "no", "unknown"),
        "letters": ("missing", "yes", "unknown"),
        "needs": ("missing", "no", "unknown"),
        "no_yaml": ("broken", "no", "unknown"),
        "nowhere": ("broken", "no", "unknown"),
        "raises": ("broken", "no", "CC0"),
        "unstated": ("missing", "no", "unknown"),
        "wrapped": ("missing", "no", "unknown"),
        "wrong_list": ("broken", "no", "unknown"),
        "wrong_part": ("broken", "no", "unknown"),
    }
    told = dict(line.split(": ", 1) for line in below)
    assert told.pop("no_yaml").startswith("--config-dir: ")
    assert told.pop("nowhere").startswith("dataset._target_: cannot import 'lettersetz.Needs'")
    assert told == {
        "raises": "RuntimeError: no such luck",
        "wrong_list": "dataset._target_: WrongList.downloads is ['https://example.org'], expected a tuple of Download.",
        "wrong_part": "dataset._target_: lettersets.WrongPart.load gave a str, expected a hybridfl.data.dataset.Dataset.",
    }


def test_the_size_of_a_folder_is_that_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "image_folder")
    Path("root/images/a").mkdir(parents=True)
    Path("root/images/b").mkdir()
    Path("root/images/a/0.png").write_bytes(bytes(1_500_000))
    Path("root/images/b/1.png").write_bytes(bytes(2_000_000))
    table, below = listed("--data-root", "root")
    assert (table["image_folder"]["state"], table["image_folder"]["size"]) == ("broken", "3.5 MB")
    assert [line.partition(":")[0] for line in below] == ["image_folder"]
