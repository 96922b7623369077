"""The verdicts on claims as a table or as data."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridfl.claims import Claim, Decision, Finding
from hybridfl.formats import Sheet, shown
from hybridfl.keys import label
from hybridfl.study import Study


@dataclass(frozen=True)
class Report:
    """The decisions on a preset's claims."""

    study: Study
    decisions: Sequence[Decision]


def as_sheet(report: Report, args: argparse.Namespace) -> Sheet:
    """A row for every claim, and one for each of its cells where it has several."""
    header = ["claim", "where", "compared", "asked", f"found [{100 * args.confidence:g} %]", "seeds", "verdict"]
    body, bold = [], set()
    for decision in report.decisions:
        claim, several = decision.claim, len(decision.findings) > 1
        if several:
            cells = f"{claim.cells} of {len(decision.findings)} cells"
            body.append([claim.id, cells, compared(claim), asked(claim), "", "", decision.verdict])
        for finding in decision.findings:
            names = (
                ["", _where(report.study, finding), "", ""]
                if several
                else [claim.id, _where(report.study, finding), compared(claim), asked(claim)]
            )
            seeds = "" if finding.evidence.absent else str(len(finding.evidence.gains))
            body.append([*names, interval(finding), seeds, finding.verdict])
    bold = {(row, len(header) - 1) for row, cells in enumerate(body) if cells[-1] == "held" and cells[0]}
    return Sheet(header, body, bold, _caption(report, args), 4)


def compared(claim: Claim) -> str:
    """The metric, and which is taken from, or divided by, which: so that a high gain and a low ratio are good."""
    metric = claim.metric if claim.target is None else f"{claim.metric} {100 * claim.target:g} %"
    ours, theirs = claim.better, claim.than
    if claim.than_scope:
        ours, theirs = f"{ours} {claim.scope}", f"{theirs} {claim.than_scope}"
    elif claim.scope != "global":
        metric += f" {claim.scope}"
    if claim.than_where:
        theirs += f" ({_listed(claim.than_where)})"
    if claim.kind == "ratio_at_most":
        return f"{metric}: {ours} / {theirs}"
    return f"{metric}: {ours} − {theirs}" if claim.gain(1, 0) > 0 else f"{metric}: {theirs} − {ours}"


def asked(claim: Claim) -> str:
    """The margin as a reader would say it."""
    if claim.kind == "ratio_at_most":
        return f"≤ {claim.by:g}"
    margin = shown(claim.margin, claim.metric, "+") if claim.margin else "0"
    return f"{'>' if claim.kind == 'better' else '≥'} {margin}"


def interval(finding: Finding) -> str:
    """Mean and interval as :func:`hybridfl.formats.difference` shows them."""
    claim = finding.evidence.claim
    if not math.isfinite(finding.mean):
        return finding.reason if finding.verdict == "missing" else "–"
    ratio = claim.kind == "ratio_at_most"
    mean, low, high = (
        f"{value:.3g}" if ratio else shown(value, claim.metric, "+")
        for value in (finding.mean, finding.low, finding.high)
    )
    return f"{mean} [{low}, {high}]" if math.isfinite(finding.low) else mean


def _where(study: Study, finding: Finding) -> str:
    """The cell, by its name if the preset has one for it."""
    if finding.evidence.claim.cells == "mean":
        return "mean over its cells"
    where = dict(finding.evidence.where)
    return next((name for name, cells in study.named.items() if cells == (where,)), "") or _listed(where) or "–"


def _listed(where: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={label(value)}" for key, value in where.items())


def _caption(report: Report, args: argparse.Namespace) -> list[str]:
    lines = [f"{decision.claim.id}: {decision.claim.text}" for decision in report.decisions]
    pairs = "pairs with the same seed, split, start and clients"
    lines.append(f"Means over {pairs}, {_how(args)}; gains in accuracy in points.")
    for decision in report.decisions:
        for finding in decision.findings:
            if finding.verdict == "undecided" and finding.reason:
                cell = f" ({_where(report.study, finding)})" if len(decision.findings) > 1 else ""
                lines.append(f"{decision.claim.id}{cell} is undecided: {finding.reason}.")
    if args.format != "latex" and (advice := advised(report, args)):
        lines += ["Runs that are missing or too few are made by:", *advice]
    return lines


def _how(args: argparse.Namespace) -> str:
    kind = "t" if args.interval == "t" else "bootstrap"
    share = f"{100 * args.confidence:g} %"
    return f"{share} {kind} interval" if not args.holm else f"{kind} intervals, all verdicts together at {share} (Holm)"


def advised(report: Report, args: argparse.Namespace, decisions: Sequence[Decision] | None = None) -> list[str]:
    """The lines that bring the runs which are missing or too few; baselines of one cell in one line."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for decision in report.decisions if decisions is None else decisions:
        for finding in decision.findings:
            for line in finding.evidence.advice:
                rest = tuple(text for text in line if not text.startswith("baseline="))
                lines.setdefault(rest, []).extend(text.partition("=")[2] for text in line if text not in rest)
    own = ["--config-dir", str(args.config_dir)] if args.config_dir else []
    return [
        shlex.join(
            [
                *("hybridfl", "train", "-m", *own, *rest),
                f"baseline={','.join(dict.fromkeys(names))}",
                f"seed={report.study.seeds}",
            ]
        )
        for rest, names in lines.items()
    ]


def as_json(report: Report, args: argparse.Namespace) -> dict[str, Any]:
    """All numbers as they are; null where one is not defined."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "preset": report.study.name,
        "confidence": args.confidence,
        "interval": args.interval,
        "holm": args.holm,
        "claims": [
            {
                **{
                    key: getattr(decision.claim, key)
                    for key in ("id", "text", "metric", "kind", "better", "than", "by")
                },
                **{"cells": decision.claim.cells, "verdict": decision.verdict},
                "found": [
                    {
                        "where": dict(finding.evidence.where),
                        "verdict": finding.verdict,
                        "mean": number(finding.mean),
                        "low": number(finding.low),
                        "high": number(finding.high),
                        "margin": decision.claim.margin,
                        "seeds": len(finding.evidence.gains),
                        "reason": finding.reason,
                    }
                    for finding in decision.findings
                ],
                "commands": advised(report, args, [decision]),
            }
            for decision in report.decisions
        ],
    }
