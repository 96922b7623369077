"""A page of results: every preset with its tables, its picture and the verdicts on its claims."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from hybridfl.cli import main
from hybridfl.config import Composer, choices
from hybridfl.formats import latex, markdown
from hybridfl.store import write_text_atomic
from results.cells import Grid, grid
from results.plots import draw
from results.sheets import accuracy_sheet, cost_sheet, least_bytes, within


def sweep(line: Sequence[str], output: Path, jobs: int) -> None:
    """Run what is missing of a sweep, in so many processes."""
    launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"] if jobs > 1 else []
    with redirect_stdout(io.StringIO()):
        main(["train", "-m", *line, f"output_dir='{output}'", *launcher])


def section(name: str, line: Sequence[str], output: Path, pages: Path, papers: Path) -> tuple[str, bool]:
    """Markdown of one preset, and whether all of its runs are there.

    Args:
        line: as typed after ``-m``, the preset first.
        output: the output folder.
        pages: where pictures go, beside the page.
        papers: where the tables go as LaTeX.
    """
    with Composer() as composer:
        whole = grid(composer, line, output)
        cells = {cell: jobs[0] for cell, jobs in composer.cells(line).items()}
    parts = [f"## {_title(name)}", "", f"    hybridfl train -m {' '.join(line)}", ""]
    caption = "Test accuracy of the global model in percent, mean of the last ten evaluations, mean ± sd over seeds."
    found = whole.begun
    if not whole.is_whole:
        left = [name for name in (*whole.columns, *whole.rows) if name not in (*found.columns, *found.rows)]
        caption += " Not all runs are there yet: (finished/planned)" + (
            f"; none of: {'; '.join(left)}." if left else "."
        )
    if not found.cells:
        return "\n".join([*parts, "Nothing is finished of it yet.", ""]), False
    sheet = accuracy_sheet(found, caption=caption)
    parts += [markdown(sheet), ""]
    papers.mkdir(parents=True, exist_ok=True)
    write_text_atomic(papers / f"{name}.tex", latex(sheet) + "\n")
    draw(found, pages / f"{name}.png")
    parts += [f"![{_title(name)}]({name}.png)", ""]
    if found.corner == "method":
        parts += _equal_bytes(found)
        parts += _costs(found)
    parts += _settings(cells, line)
    parts += _claims(name, line, output)
    return "\n".join(parts), whole.is_whole


def _title(name: str) -> str:
    lines = choices("experiment")[name].read_text(encoding="utf-8").splitlines()
    return lines[1].lstrip("# ").partition(". ")[0]


def _equal_bytes(found: Grid) -> list[str]:
    """A table more where methods move different amounts."""
    budget = least_bytes(list(found.cells.values()))
    spent = {run.curves["global"].bytes[-1] for runs in found.cells.values() for run in runs}
    if max(spent, default=0) <= 1.05 * budget:
        return ["All methods move the same bytes, to 5 %.", ""]
    caption = f"The same at equal bytes: the last ten evaluations within the {budget / 1e6:.1f} MB of the cheapest."
    return [markdown(accuracy_sheet(found, within(budget), caption)), ""]


def _costs(found: Grid) -> list[str]:
    column = found.columns[0]
    return [
        f"<details><summary>Costs, {column}</summary>",
        "",
        markdown(cost_sheet(found, column)),
        "",
        "</details>",
        "",
    ]


def _settings(cells: dict[str, list[str]], line: Sequence[str]) -> list[str]:
    shared = set.intersection(*map(set, cells.values())) if len(cells) > 1 else set()
    left_out = ("seed=", "baseline=", "experiment=", "scale=")
    lines = []
    for cell, job in cells.items():
        own = [text for text in job if text not in shared and not text.startswith(left_out)]
        lines.append(f"- {cell}: " + (" ".join(f"`{text}`" for text in own) or "the preset as it is"))
    return ["<details><summary>Settings</summary>", "", *lines, "", "</details>", ""]


def _claims(name: str, line: Sequence[str], output: Path) -> list[str]:
    if "\nclaims:" not in choices("experiment")[name].read_text(encoding="utf-8"):
        return []
    text = io.StringIO()
    with redirect_stdout(text):
        main(["claims", name, *line[1:], str(output), "--format", "markdown"])
    return ["### Claims", "", text.getvalue().strip(), ""]
