"""What the search for coefficients costs beside plain training on the same batches, in time and in memory.

    python scripts/bench_search.py                     ResNet-18 (11 M parameters), an atlas of 20, batches of 32
    python scripts/bench_search.py --anchors 50 --device cuda

A step of the search merges the anchors, goes forward and backward through the net once, and takes an inner product with
every anchor (arXiv 2503.20138; the gradient is inferred). Beside it goes a loop that only goes forward and backward. Each
lives in a process of its own; they take turns. Memory is told in copies of the weights: what the process of the search held
at most, less what that of the loop did, plus the loop's two, weights and gradient.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hybridfl.local import Task, Workbench, laid_out, run_task
from hybridfl.merging import atlas
from hybridfl.merging.objectives import SearchLoss
from hybridfl.models.resnet import ResNet
from hybridfl.optimizers import Adam
from hybridfl.parametrization import AtlasSpan
from hybridfl.params import Layout, Params
from hybridfl.rng import stream
from hybridfl.stateless import run_net
from hybridfl.types import SERVER, Job, Model

EXAMPLES = 512
LOOP_COPIES = 2
"""Weights and their gradient."""


def bench_of(device: torch.device, quick: bool) -> tuple[Workbench, Params]:
    """Random images of the shape of CIFAR-10's, and the weights of a ResNet-18 with GroupNorm."""
    torch.manual_seed(0)
    channels = (8, 16) if quick else (64, 128, 256, 512)
    net = ResNet((3, 32, 32), 10, channels=channels, blocks=(2,) * len(channels), shortcut="B").to(device)
    x = laid_out(torch.randn(EXAMPLES, 3, 32, 32, device=device))
    y = torch.randint(0, 10, (EXAMPLES,), device=device)
    return Workbench(net, x, y, chunk=256), {name: tensor.detach() for name, tensor in net.named_parameters()}


def search(bench: Workbench, params: Params, anchors: int, steps: int, batch: int) -> Callable[[], None]:
    """So many steps of Feddle's search, as its method asks for them."""
    layout = Layout.of(params)
    origin = torch.cat([tensor.reshape(-1) for tensor in params.values()])
    updates = [torch.randn_like(origin) * 1e-3 for _ in range(anchors)]
    span = AtlasSpan(layout, atlas.segments(layout, 1))
    frozen = {
        "origin": origin,
        "anchors": updates,
        "scales": origin.new_ones(anchors, 1),
        "total": origin.new_tensor(1.0),
    }
    start = origin.new_full((anchors, 1), 1 / anchors)
    job = Job(
        SERVER,
        Model({"c": start}, {}),
        parametrization=span,
        frozen=frozen,
        loss=SearchLoss("ce", span),
        ctx={"default": start, "prox": 0.0, "span_frozen": frozen},
    )
    work, rows = Adam(lr=0.01, steps=steps, batch_size=batch), torch.arange(EXAMPLES, device=bench.x.device)

    def run() -> None:
        run_task(bench, Task(job, work, steps, rows, 0, 1, 0, ("search",)))

    return run


def loop(bench: Workbench, params: Params, steps: int, batch: int) -> Callable[[], None]:
    """As many batches forward and backward, and nothing else."""
    weights = {name: laid_out(tensor).requires_grad_() for name, tensor in params.items()}
    rng = stream(0, "search")

    def run() -> None:
        for _ in range(steps):
            rows = torch.from_numpy(rng.permutation(EXAMPLES)[:batch]).to(bench.x.device)
            loss = F.cross_entropy(run_net(bench.net, weights, {}, bench.x[rows]), bench.y[rows])
            torch.autograd.grad(loss, list(weights.values()))
            loss.item()

    return run


def peak(device: torch.device) -> float:
    """Bytes, the most that was held."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def child(chosen: argparse.Namespace) -> None:
    """Does the work of one side whenever a line arrives, and tells the seconds."""
    torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    bench, params = bench_of(device, chosen.quick)
    if chosen.child == "search":
        run = search(bench, params, chosen.anchors, chosen.steps, chosen.batch)
    else:
        run = loop(bench, params, chosen.steps, chosen.batch)
    size = sum(tensor.nbytes for tensor in params.values())
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak(device), "size": size}), flush=True)


def asked(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"bench_search: a process ended with status {process.wait()}; its error is above.")
    found: dict[str, Any] = json.loads(line)
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="timed as one")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a toy net: the numbers mean nothing")
    parser.add_argument("--child", choices=("search", "loop"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    chosen = parsed()
    if chosen.child:
        child(chosen)
        return
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child"]
    sides = {
        side: subprocess.Popen([*command, side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for side in ("search", "loop")
    }
    try:
        answers = [{side: asked(process) for side, process in sides.items()} for _ in range(chosen.repeats + 1)]
    finally:
        for process in sides.values():
            process.kill()
            process.wait()
    timed = answers[1:]  # the first is for caches and allocators
    ratios = sorted(answer["search"]["seconds"] / answer["loop"]["seconds"] for answer in timed)
    last = answers[-1]
    copies = (last["search"]["peak"] - last["loop"]["peak"]) / last["loop"]["size"] + LOOP_COPIES
    for side in sides:
        seconds = statistics.median(answer[side]["seconds"] for answer in timed) / chosen.steps
        print(f"{side:7} {seconds * 1e3:8.1f} ms a step, {last[side]['peak'] / 2**20:6.0f} MiB at most")
    print(
        f"search / loop {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, "
        f"{chosen.repeats} repeats); {copies:.1f} copies of {last['loop']['size'] / 2**20:.0f} MiB "
        f"with {chosen.anchors} anchors"
    )


if __name__ == "__main__":
    main()
