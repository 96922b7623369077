"""``hybridfl export RUN``: what a run would deploy, as a file that plain torch loads."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from hybridfl.errors import ConfigError
from hybridfl.finding import find_run
from hybridfl.runs import Run, number

SERVER = -1
"""As in :mod:`hybridfl.types`, which imports torch."""

EPILOG = """\
It writes model.safetensors and, beside it, model.yaml, which says what the model is and how its inputs are scaled. One
model loads into the class that model.yaml names (x are raw images (n, channels, height, width) in float):

    from pathlib import Path
    import torch, yaml
    from safetensors.torch import load_file
    from hybridfl.models.cnn import CNN

    about = yaml.safe_load(Path("model.yaml").read_text())
    options = {key: value for key, value in about["model"].items() if key != "_target_"}
    mean, std = (torch.tensor(about[key]).view(-1, 1, 1) for key in ("mean", "std"))
    net = CNN(input_shape=about["input_shape"], classes=about["classes"], **options)
    net.load_state_dict(load_file("model.safetensors"))
    logits = net.eval()((x - mean) / std)

Split-Mix and others deploy several models, whose logits are mixed. Then the last three lines are

    logits = 0
    for member in about["members"]:
        net = CNN(input_shape=about["input_shape"], classes=about["classes"], **options | {"width": member["width"]})
        names = {name: member["prefix"] + name for name in net.state_dict()}
        tensors = load_file("model.safetensors")
        net.load_state_dict({name: tensors[stored] for name, stored in names.items()})
        logits = logits + member["weight"] * net.eval()((x - mean) / std)

dtype float64 in model.yaml asks for net.double() and such inputs. With batch_norm: batch the net has no running statistics:
net = hybridfl.models.batch_norm.with_policy(net, "batch"), before load_state_dict.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl export``."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder, its digest, or the beginning of the digest; of one that has not ended, "
        "the last checkpoint")  # fmt: skip
    add("-o", "--out", type=Path, required=True, metavar="FILE", help="what to write, such as model.safetensors")
    add("--participant", type=_participant, default=SERVER, metavar="N", help="a client, or server (the default)")
    add("--width", type=float, metavar="W", help="one of the widths that the method serves")
    add("--output-dir", default="outputs", help="where runs/ is (default: %(default)s)")
    add("--data-root", metavar="DIR", help="where the data are (default: where the run found them, else as in train)")


def run(args: argparse.Namespace) -> int:
    """Writes the model and returns the exit status."""
    found = find_run(args.run, Path(args.output_dir))
    from hybridfl.exported import described, exported, write_exported
    from hybridfl.restored import plan_of, snapshot_of

    described(args.out)
    plan = plan_of(found, args.data_root)
    snapshot = snapshot_of(found, plan)
    said = write_exported(args.out, exported(plan, snapshot, args.participant, args.width))
    whose = "the global model" if args.participant == SERVER else f"client {args.participant}'s model"
    print(said)
    rounds = f"round {snapshot.round} of {plan.settings.rounds}"
    print(
        f"{whose} of {plan.composed.method_name} after {rounds}{accuracy(found, snapshot.round, args.participant, args.width)}"
    )
    return 0


def accuracy(run: Run, round: int, participant: int = SERVER, width: float | None = None) -> str:
    """What the run's tables say of the model after the round, to be put behind a sentence; nothing if it was not scored."""
    if participant == SERVER:
        curve = run.curves.get("global" if width is None else f"global/width={width:g}")
        scores = dict(zip(curve.rounds, curve.column("accuracy"), strict=True)) if curve else {}
        return _percent(scores.get(round), "of the server's test set")
    if width is not None or not (run.folder / "clients.csv").is_file():
        return ""
    with (run.folder / "clients.csv").open(newline="", encoding="utf-8") as file:
        own = {(row["round"], row["client"]): number(row["accuracy"]) for row in csv.DictReader(file)}
    return _percent(own.get((str(round), str(participant))), "of its own test set")


def _percent(score: float | None, of: str) -> str:
    return "" if score is None else f", accuracy {100 * score:.2f} % {of}"


def _participant(text: str) -> int:
    if text == "server":
        return SERVER
    if text.isdecimal():
        return int(text)
    raise ConfigError("--participant", f"got '{text}': expected server or the number of a client, such as 7.")
