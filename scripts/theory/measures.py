"""The probes T1 to T6: rows of numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping

import torch

from hybridfl.rng import stream
from hybridfl.types import SERVER, View
from theory.levels import Levels, Line, Row
from theory.search import Search
from theory.traces import Lab
from theory.watching import Moment, watched


def span_of_the_atlas(lab: Lab) -> list[Row]:
    """T1."""
    found = []
    for alpha in lab.levels.alphas:
        for size in lab.levels.sizes:
            line = (*setting("alpha", alpha), f"merging.atlas.size={size}")
            found += [{"alpha": alpha, "size": size, **row} for row in lab.rounds_of({"": line}, lab.levels.short)]
    return found


OWN = {"alpha": 0.1, "delay": 4.0, "m": 5}
"""The preset's own values of what T3 varies: the same run, which is not done again."""

KEYS = {"alpha": "partitioning.alpha", "delay": "clients.delay", "m": "clients.per_round"}

NOISY: Line = ("clients.noisy_labels=0.4",)

METHODS: Mapping[str, Line] = {"feddle": (), "fedbuff": ("baseline=fedbuff",)}


def setting(factor: str, level: float) -> Line:
    return () if level == OWN[factor] else (f"{KEYS[factor]}={level:g}",)


def variances(lab: Lab) -> list[Row]:
    """T2."""
    easy = ("partitioning.alpha=1000000", "clients.delay=0")
    settings = {f"alpha {alpha:g}": setting("alpha", alpha) for alpha in lab.levels.alphas}
    settings |= {
        "alpha 0.1, 40 % noisy": NOISY,
        "iid, no delay": easy,
        "iid, no delay, full batches": (*easy, "client_optimizer.batch_size=100000"),
    }
    return lab.rounds_of(settings, lab.levels.rounds)


def rounds_to_target(lab: Lab) -> list[Row]:
    """T3."""
    levels, found = lab.levels, []
    for factor, varied in (("alpha", levels.alphas), ("delay", levels.delays), ("m", levels.cohorts)):
        for level in varied:
            for method, baseline in METHODS.items():
                for seed in lab.seeds:
                    rows = lab.trace((*setting(factor, level), *baseline), seed, levels.rounds).rounds
                    reached = next((row["round"] for row in rows if row["accuracy"] >= levels.target), None)
                    found.append({"factor": factor, "level": level, "method": method, "seed": seed, "rounds": reached})
    return found


def excess_losses(lab: Lab) -> list[Row]:
    """T4: of coefficients searched on n_s examples, against those searched on all the fresh examples themselves."""
    levels, found = lab.levels, []
    line = (f"merging.atlas.size={max(levels.sizes)}", f"server_data.examples={levels.owned}")
    for seed in lab.seeds:
        began = time.perf_counter()
        for moment in watched(lab.plan(line, seed, max(levels.moments))):
            if moment.index + 1 in levels.moments:
                found += [{"seed": seed, **row} for row in _excess(moment, levels, seed)]
        print(f"{time.perf_counter() - began:6.1f} s  seed={seed} searches of T4", file=sys.stderr, flush=True)
    return found


def _excess(moment: Moment, levels: Levels, seed: int) -> Iterator[Row]:
    federation = moment.plan.federation
    rows = federation.rows(SERVER, View(), moment.index)
    x, y = (
        torch.cat([federation.bench.x[rows], federation.test[0]]),
        torch.cat([federation.bench.y[rows], federation.test[1]]),
    )
    for size in levels.sizes:
        entries = moment.entries[-size:]
        search = Search(moment, entries, levels.steps)
        for draw in range(levels.draws):
            order = torch.from_numpy(stream(seed, "examples of a search", moment.index, draw).permutation(len(y)))
            fresh = order[max(levels.examples) :]
            best = search.loss(search.found(x[fresh], y[fresh], 0.0), x[fresh], y[fresh])
            default = search.loss(search.default, x[fresh], y[fresh])
            for number in levels.examples:
                seen = order[:number]
                for prox in (0.0, 0.1):
                    c = search.found(x[seen], y[seen], prox)
                    loss = search.loss(c, x[fresh], y[fresh])
                    yield {
                        "round": moment.index + 1,
                        "draw": draw,
                        "anchors": len(entries),
                        "examples": number,
                        "prox": prox,
                        "excess": loss - best,
                        "gain": default - loss,
                        "possible_gain": default - best,
                    }


def surrogates(lab: Lab) -> list[Row]:
    """T5."""
    found = []
    for pair, data in lab.levels.pairs.items():
        for objective in lab.levels.objectives:
            line = (*data, f"merging.objective={objective}")
            rows = lab.rounds_of({"": line}, lab.levels.short)
            found += [{"pair": pair, "objective": objective, **row} for row in rows]
    return found


def coefficients_by_quality(lab: Lab) -> list[Row]:
    """T6."""
    settings: dict[str, Line] = {"40 % noisy": NOISY, "clean": ()}
    return [
        {"setting": name, "seed": seed, **row}
        for name, line in settings.items()
        for seed in lab.seeds
        for row in lab.trace(line, seed, lab.levels.rounds).coefficients
    ]
