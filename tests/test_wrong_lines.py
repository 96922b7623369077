"""Mistakes as users make them: each row is one, with what must be there first and what the answer must say.

An answer is one message that names the key or file, the value and the nearest valid choice, with exit status 2.
Nothing is trained, and every file on disk, an earlier finished run among them, is byte for byte what it was.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import shlex
import shutil
import struct
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cli_helpers import SMALL_DATA, SMALL_WORK, TINY, call, done
from PIL import Image
from safetensors.torch import load_file, save_file

from hybridfl.command_status import PACKAGES
from hybridfl.engine import Engine

DATA = "server_data.examples=10 clients.number=3 clients.per_round=2 data_root=data"
WORDS = {
    "TINY": " ".join(TINY),
    "WORK": " ".join(SMALL_WORK),
    "DATA": DATA,
    "ONE": f"pretrain {' '.join(SMALL_DATA)} rounds=1",
}
"""What stands in a row's line for several words; RUN and SWEEP are the names of folders."""


class Place(NamedTuple):
    """A folder with a finished run, a finished sweep and the weights ``w.safetensors`` of the run."""

    root: Path
    run: Path
    sweep: Path
    patch: pytest.MonkeyPatch


Prepare = Callable[[Place], object]


class Row(NamedTuple):
    """A mistake.

    Attributes:
        prepare: what is done in the place before, such as damage.
        line: what is typed after ``hybridfl``.
        parts: what the answer holds, the first one at its beginning.
        status: 1 where nothing is wrong with the input.
    """

    name: str
    prepare: Prepare | None
    line: str
    parts: tuple[str, ...]
    status: int = 2


# -- what is there before ---------------------------------------------------------------------------------------------


def file(name: str, content: str | bytes) -> Prepare:
    """A new or other file; RUN and SWEEP begin names of files in theirs."""

    def prepare(place: Place) -> None:
        path = at(place, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def cut(name: str, size: int) -> Prepare:
    """A file of which the rest is missing: so many bytes are there, or are not if it is negative."""

    def prepare(place: Place) -> None:
        for path in sorted(place.root.glob(str(at(place, name).relative_to(place.root)))):
            path.write_bytes(path.read_bytes()[:size])

    return prepare


def swapped(name: str, old: str, new: str) -> Prepare:
    def prepare(place: Place) -> None:
        text = at(place, name).read_text()
        assert old in text
        at(place, name).write_text(text.replace(old, new))

    return prepare


def exchanged(name: str, other: str) -> Prepare:
    """In the place of a file is another one."""
    return lambda place: shutil.copy(place.root / other, place.root / name)


def folder(name: str) -> Prepare:
    return lambda place: (place.root / name).mkdir(parents=True)


def gone(name: str) -> Prepare:
    def prepare(place: Place) -> None:
        path = at(place, name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def both(*steps: Prepare) -> Prepare:
    return lambda place: [step(place) for step in steps]


def at(place: Place, name: str) -> Path:
    first, _, rest = name.partition("/")
    return {"RUN": place.run, "SWEEP": place.sweep}.get(first, place.root / first) / rest


def mnist(place: Place) -> None:
    (place.root / "data/mnist").mkdir(parents=True)
    for part, number in (("train", 60), ("t10k", 40)):
        images = struct.pack(">4I", 2051, number, 28, 28) + bytes(number * 784)
        labels = struct.pack(">2I", 2049, number) + bytes(k % 10 for k in range(number))
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            (place.root / f"data/mnist/{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


CIFAR = "data/cifar10/cifar-10-batches-py"


def cifar(place: Place) -> None:
    batch = {"data": np.zeros((20, 3072), dtype=np.uint8), "labels": [k % 10 for k in range(20)]}
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        file(f"{CIFAR}/{name}", pickle.dumps(batch, protocol=4))(place)


def npz(**arrays: object) -> Prepare:
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    return file("data/mnist_m/mnist_m.npz", content.getvalue())


IMAGES, LABELS = np.zeros((20, 32, 32, 3), dtype=np.uint8), np.arange(20) % 10
PARTS = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS}


def images(place: Place) -> None:
    for kind in ("cat", "dog"):
        for number in range(5):
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(content, "PNG")
            file(f"data/images/{kind}/{number}.png", content.getvalue())(place)


def member(name: str, content: str) -> Prepare:
    """A zip of the class cow with this one member."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, content)
    return both(images, file("data/images/cow.zip", packed.getvalue()))


class Evil:
    """A pickle of it would make a folder when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("pwned",)


def saved(value: object) -> Prepare:
    """By ``torch.save``, as ``e.pt``."""
    return lambda place: torch.save(value, place.root / "e.pt")


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Prepare:
    """``e.safetensors``, the run's weights changed."""

    def prepare(place: Place) -> None:
        found = load_file(place.root / "w.safetensors")
        save_file({name: change(tensor) for name, tensor in found.items()}, place.root / "e.safetensors")

    return prepare


def preset(text: str) -> Prepare:
    """A preset of the user's, ``experiment=mine``."""
    return file("c/experiment/mine.yaml", f"# @package _global_\n# Mine.\n{text}\n")


def claim(text: str) -> Prepare:
    return preset(f"claims: [{{id: a, text: told, better: fedavg, than: fedprox, {text}}}]")


def without(package: str, *modules: str) -> Prepare:
    """As if the package were not installed; the modules are imported anew."""

    def prepare(place: Place) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == package or name in modules]:
            place.patch.delitem(sys.modules, name)
        place.patch.setitem(sys.modules, package, None)

    return prepare


def frozen(place: Place) -> None:
    """Below ``frozen`` is a disk that can only be read."""
    mkdir = Path.mkdir

    def refused(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if "frozen" in path.parts:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        mkdir(path, mode, parents, exist_ok)

    place.patch.setattr(Path, "mkdir", refused)


def unfinished(place: Place) -> None:
    swapped("RUN/status.json", '"done"', '"running"')(place)


# -- the mistakes -----------------------------------------------------------------------------------------------------

FEW = "dataset=synthetic dataset.train=200 dataset.test=100"

COMMANDS = [
    Row("command", None, "trian", ("trian: unknown command", "'train'")),
    Row("option for key", None, "train --rounds=5", ("--rounds: unknown option", "rounds=VALUE", "--dry-run")),
    Row("option misspelt", None, "train --dry-rnu", ("--dry-rnu: unknown option", "Did you mean '--dry-run'?")),
    Row("short option", None, "split -m seed=0,1", ("-m: unknown option of `hybridfl split`", "--out")),
    Row("option of compare", None, "compare --colls method", ("--colls: unknown option", "'--cols'")),
    Row("option without value", None, "export RUN -o", ("-o/--out: expected one argument",)),
    Row("required option", None, "export RUN", ("-o/--out: is missing", "hybridfl export --help")),
    Row("required argument", None, "data fetch", ("NAME: is missing", "hybridfl data fetch --help")),
    Row("one too many", None, "show RUN other", ("other: is more than `hybridfl show` takes",)),
    Row("no number", None, "export RUN -o x.safetensors --width wide", ("--width: got 'wide': expected a number",)),
    Row("subcommand", None, "data lst", ("COMMAND: got 'lst'. Did you mean 'list'?",)),
    Row("override without =", None, "train RUN", ("RUN: is not an override", "rounds=10")),
    Row("spaces around =", None, "train rounds = 5", ("rounds: is not an override", "key=value")),
    Row("group of list", None, "list modle", ("modle: unknown config group. Did you mean 'model'?",)),
]
KEYS = [
    Row("key in no group", None, "train TINY merging=ties",
        ("merging.search.steps: unknown key. Valid: merging._target_, merging.density",)),
    Row("group in a group", None, "train TINY clients.timng.latency=3", ("clients.timng.latency", "'clients.timing'")),
    Row("no key is near", None, "train TINY model.batch_norm=local",
        ("model.batch_norm: unknown key. Valid: model._target_, model.hidden",)),
    Row("place of a choice", None, "train TINY model@x=cnn", ("model@x: ", "nearest valid choice: model=cnn")),
    Row("a method as baseline", None, "train TINY baseline=feddle",
        ("baseline: got 'feddle'; nearest valid choice: merging=feddle baseline=none",)),
    Row("a baseline as merging", None, "train TINY merging=fedavg", ("merging: got 'fedavg'", "baseline=fedavg")),
    Row("key with a comma list", None, "train TINY dataset=synthetic,digits",
        ("dataset: got 'synthetic,digits'", "needs -m")),
    Row("two words as a number", None, "train TINY 'clients.number=5 6'",
        ("clients.number: got '5 6': expected a whole number",)),
    Row("a list as a number", None, "train TINY partitioning.alpha=[0.1]",
        ("partitioning.alpha: got [0.1]: expected a number",)),
    Row("yes", None, "train TINY tf32=yes", ("tf32: got 'yes': expected true or false",)),
    Row("an infinite rate", None, "train TINY client_optimizer.lr=inf",
        ("client_optimizer.lr: got inf: must be finite",)),
    Row("warm-up longer than the run", None, "train TINY client_optimizer.schedule.warmup=50",
        ("client_optimizer.schedule.warmup: got 50", "rounds=4; nearest valid value: 3")),
    Row("device that is not there", None, "train TINY device=cuda:99", ("device: got 'cuda:99'", "nearest valid")),
    Row("precision", None, "train TINY dtype=float64 mixed_precision=bfloat16",
        ("mixed_precision: got bfloat16 with dtype=float64; nearest valid choice: none",)),
]  # fmt: skip
SPLITS = [
    Row("more clients than examples", None, "train TINY clients.number=500",
        ("clients.number: got 500", "160 training examples", "the largest valid value is 160")),
    Row("shards", None, "train TINY partitioning=shards partitioning.per_client=100",
        ("partitioning.per_client: got 100", "500 shards", "the largest valid value is 32")),
    Row("classes for each client", None, "train TINY partitioning=classes partitioning.per_client=11",
        ("partitioning.per_client: got 11", "the largest valid value is 10")),
    Row("too few clients for the classes", None, "train TINY partitioning=classes clients.number=3",
        ("partitioning.per_client: got 2", "3 clients, 10 classes", "the smallest valid value is 4")),
    Row("the server takes all", None, "train TINY server_data.examples=200",
        ("server_data: the server takes all 200 training examples", "at most 195")),
    Row("more for the server than there is", None, "train TINY dataset.train=30",
        ("server_data.examples: got 40", "30 training examples", "the largest valid value is 30")),
    Row("a class twice", None, "train TINY server_data.classes=[3,3]",
        ("server_data.classes: got [3, 3]", "nearest valid value: [3]")),
    Row("classes that go down", None, "train TINY classes=5-3", ("classes: got '5-3'", "nearest valid value: 3-5")),
    Row("classes nobody has", None, "train TINY classes=5-12", ("classes: got 10", "0 to 9")),
    Row("one class", None, "train TINY classes=[3]", ("classes: got [3]: expected two classes or more",)),
    Row("more tasks than classes", None, "train TINY rounds=20 tasks.number=20",
        ("tasks.number: got 20", "10 classes; nearest: 10")),
    Row("nobody is left", None, "train TINY clients.held_out=5", ("clients.held_out: got 5", "nearest valid value: 4")),
    Row("no file of a split", None, "split TINY partitioning=file",
        ("partitioning.path: got null", "partitioning.path=outputs/runs/DIGEST/split.json")),
    Row("split of other clients", None,
        "train TINY clients.number=4 partitioning=file partitioning.path=outputs/runs/RUN/split.json",
        ("partitioning.path: ", "5 clients", "set it to 5")),
    Row("split cut short", cut("RUN/split.json", 300),
        "train TINY partitioning=file partitioning.path=outputs/runs/RUN/split.json",
        ("partitioning.path: ", "split.json' is no JSON")),
    Row("split with a wrong position", file("s.json", "[[1],[9999],[2],[3],[4]]"),
        "train TINY partitioning=file partitioning.path=s.json",
        ("partitioning.path: 's.json' gives client 1 example 9999", "nearest valid position is 199")),
    Row("out of split", None, "split TINY --out w.safetensors", ("--out: cannot write to 'w.safetensors'", "folder")),
]  # fmt: skip
METHODS = [
    Row("synchronous with delay", None, "train TINY baseline=ditto clients.delay=2",
        ("clients.delay: got 2", "baseline=ditto", "baseline=fedbuff")),
    Row("synchronous in an event queue", None, "train TINY baseline=fedprox clients.concurrency=2",
        ("clients.concurrency: got 2", "nearest valid value: null", "baseline=fedbuff")),
    Row("needs server labels", None, "train TINY baseline=fltrust server_data.labelled=false",
        ("server_data: baseline=fltrust requires server_labels", "server_data.labelled=true")),
    Row("needs server data", None, f"train {FEW} baseline=server_only server_data=none",
        ("server_data: baseline=server_only requires server_data", "try server_data=share")),
    Row("a server's start without labels", None, "train TINY baseline=apfl start=server server_data.labelled=false",
        ("start: got server", "server_data.labelled=true")),
    Row("peers in a star", None, "train TINY baseline=dsgd topology=star",
        ("topology: got star, but baseline=dsgd needs peers; valid: auto, bipartite",)),
    Row("a torus of seven", None, "train TINY baseline=dsgd topology=torus clients.number=7",
        ("topology: got 7 agents", "nearest valid number: 9")),
    Row("more attackers than it takes", None, "train TINY baseline=krum baseline.byzantine=4",
        ("baseline.byzantine: got 4", "nearest valid value: 0")),
    Row("more in a cycle than there are", None, "train TINY clients=cyclic clients.number=5 clients.cycle.groups=9",
        ("clients.cycle.groups: got 9", "5 clients train; nearest valid value: 5")),
]  # fmt: skip
DATASETS = [
    Row("IDX cut short", both(mnist, cut("data/mnist/train-images*", -20)), "train DATA dataset=mnist",
        ("data/mnist/train-images-idx3-ubyte.gz: truncated", "Put the four original IDX files")),
    Row("IDX of another part",
        both(mnist, exchanged("data/mnist/train-labels-idx1-ubyte.gz", "data/mnist/t10k-labels-idx1-ubyte.gz")),
        "train DATA dataset=mnist",
        ("data/mnist/train-labels-idx1-ubyte.gz: 60 images but 40 labels", "put the original back")),
    Row("more than the file has", mnist, "train DATA dataset=mnist dataset.limit=1000",
        ("dataset.limit: got 1000", "nearest valid value: 60")),
    Row("one folder too deep", mnist, "train DATA data_root=data/mnist dataset=mnist",
        ("data/mnist/mnist/train-images-idx3-ubyte.gz: not found", "the folder that holds mnist/")),
    Row("CIFAR batch cut short", both(cifar, cut(f"{CIFAR}/data_batch_3", -100)), "train DATA dataset=cifar10",
        (f"{CIFAR}/data_batch_3: truncated or no pickle", "Put the six batch files")),
    Row("CIFAR batch that runs code", both(cifar, file(f"{CIFAR}/data_batch_2", pickle.dumps(Evil()))),
        "train DATA dataset=cifar10", (f"{CIFAR}/data_batch_2: refused", "posix.mkdir", "get the original")),
    Row("npz cut short", both(npz(**PARTS), cut("data/mnist_m/*", -100)), "train DATA dataset=mnist_m",
        ("data/mnist_m/mnist_m.npz: truncated or damaged", "Put mnist_m.npz")),
    Row("npz of other arrays", npz(x=np.zeros(3)), "train DATA dataset=mnist_m",
        ("data/mnist_m/mnist_m.npz: has no array x_train", "Put mnist_m.npz")),
    Row("zip with a wrong member", member("a/b/c.png", "x"), "train DATA dataset=image_folder",
        ("data/images/cow.zip: holds a/b/c.png, expected IMAGE", "dataset.first_level=domain")),
    Row("zip without images", member("readme.txt", "x"), "train DATA dataset=image_folder",
        ("data/images/cow.zip: there are no images", ".png")),
    Row("zip that is none", both(images, file("data/images/cow.zip", "x")), "train DATA dataset=image_folder",
        ("data/images/cow.zip: no zip file or truncated", "Put the original back")),
    Row("csv with half a line", both(images, file("data/images/index.csv", "class,file,split\ncat,3.png")),
        "train DATA dataset=image_folder", ("data/images/index.csv: line 2 has not 3 values", "remove it to split")),
    Row("csv without a column", both(images, file("data/images/index.csv", "class,file\ncat,3.png\n")),
        "train DATA dataset=image_folder", ("data/images/index.csv: has no column split",)),
    Row("one class of images", both(images, gone("data/images/dog")), "train DATA dataset=image_folder",
        ("dataset: got images, which has one class only", "two are needed")),
    Row("data root that is a file", None, "data fetch mnist --data-root w.safetensors",
        ("--data-root: cannot write to 'w.safetensors/mnist'", "name a folder")),
    Row("unknown data set", None, "data fetch minst", ("minst: unknown data set. Did you mean 'mnist'?",)),
    Row("nothing to fetch", None, "data fetch synthetic", ("synthetic: there is nothing to fetch",)),
    Row("mirror", None, "data fetch mnist --mirror ftp://x", ("--mirror: got 'ftp://x'", "https://")),
]  # fmt: skip
WEIGHTS = [
    Row("weights cut short", cut("w.safetensors", 100), "train TINY start=w.safetensors",
        ("start: cannot read 'w.safetensors' as weights", "expected safetensors")),
    Row("weights that run code", saved({"w": Evil()}), "train TINY start=e.pt",
        ("start: cannot read 'e.pt' as weights (UnpicklingError)", "a state dict saved by torch.save")),
    Row("no weights", saved({}), "train TINY start=e.pt", ("start: 'e.pt' holds no name",)),
    Row("not finite", weights(lambda tensor: tensor * float("nan")), "train TINY start=e.safetensors",
        ("start: e.safetensors: 'body.1.weight' holds numbers that are not finite",)),
    Row("whole numbers", weights(lambda tensor: tensor.long()), "train TINY start=e.safetensors",
        ("start: e.safetensors: 'body.1.weight' holds int64, the net's float32",)),
    Row("weights of another net", None, "train TINY start=w.safetensors model.hidden=[32]",
        ("start: w.safetensors: 'body.1.weight' is (16, 64) in the file, (32, 64) in the net",)),
    Row("empty start", None, "train TINY start=", ("start: got ''. Valid: random, server, solo.",)),
    Row("a folder as start", None, "train TINY start=outputs", ("start: got 'outputs'. ", "random, server, solo")),
    Row("merging of what runs code", saved({"w": Evil()}), "merge e.pt w.safetensors -o x.safetensors",
        ("e.pt: cannot read 'e.pt' as weights",)),
    Row("merging of nothing", saved({}), "merge e.pt e.pt -o x.safetensors", ("e.pt: 'e.pt' holds no name",)),
    Row("merging of what cannot fit", saved({"w": torch.zeros(2)}), "merge w.safetensors e.pt -o x.safetensors",
        ("e.pt: does not fit w.safetensors: it lacks body.1.bias", "only it has w")),
    Row("method of merge", None, "merge w.safetensors -o x.pt --method tis", ("--method: got 'tis'", "'ties'")),
    Row("missing base", None, "merge w.safetensors -o x.pt --method ties", ("--base: is needed",)),
    Row("weights of merge", None, "merge w.safetensors -o x.pt --weights 2,3",
        ("--weights: got '2,3': expected a number for each model, such as 1",)),
    Row("merge onto a folder", folder("outputs.pt"), "merge w.safetensors -o outputs.pt",
        ("--out: got 'outputs.pt', which is a folder",)),
    Row("merge below a file", None, "merge w.safetensors -o w.yaml/x.pt",
        ("--out: got 'w.yaml/x.pt', and 'w.yaml' in it is no folder",)),
]  # fmt: skip
FOLDERS = [
    Row("output below a file", None, "train TINY output_dir=w.yaml",
        ("output_dir: cannot write to 'w.yaml/runs' (Not a directory)", "name a folder")),
    Row("output of a sweep below a file", None, "train -m TINY seed=0,1 output_dir=w.yaml",
        ("output_dir: cannot write to 'w.yaml/sweeps/", "name a folder")),
    Row("runs is a file", both(gone("outputs/runs"), file("outputs/runs", "x")), "train TINY",
        ("output_dir: cannot write to 'outputs/runs' (File exists)",)),
    Row("read-only disk", frozen, "train TINY output_dir=frozen/here",
        ("output_dir: cannot write to 'frozen/here/runs' (Read-only file system)",)),
    Row("read-only disk for a sweep", frozen, "train -m TINY seed=0,1 output_dir=frozen",
        ("output_dir: cannot write to 'frozen/sweeps/", "Read-only file system")),
    Row("pretrain below a file", None, "ONE -o w.yaml/x.safetensors",
        ("--out: got 'w.yaml/x.safetensors', and 'w.yaml'",)),
    Row("pretrain onto a folder", folder("x.safetensors"), "ONE -o x.safetensors",
        ("--out: got 'x.safetensors', which is a folder",)),
    Row("pretrain in another format", None, "ONE -o x.pt", ("--out: got 'x.pt': nearest valid value: x.safetensors",)),
    Row("export below a file", None, "export RUN -o w.yaml/x.safetensors", ("--out: got 'w.yaml/x.safetensors'",)),
]  # fmt: skip
RUNS = [
    Row("unknown run", None, "show 000000", ("000000: no run folder, and no run in 'outputs/runs'", "Valid: ", "RUN")),
    Row("unknown run to export", None, "export 000000 -o x.safetensors", ("000000: no run folder", "RUN")),
    Row("unknown run to compare", None, "compare outputs/runs/nope", ("outputs/runs/nope: does not exist", "RUN")),
    Row("show of a sweep", None, "show outputs/sweeps/SWEEP",
        ("outputs/sweeps/SWEEP: is a sweep, not a run; hybridfl compare",)),
    Row("show of an output folder", None, "show outputs", ("outputs: is an output folder", "hybridfl compare outputs")),
    Row("compare of a file", None, "compare w.yaml", ("w.yaml: is not a run folder", "sweep folder")),
    Row("no outputs", gone("outputs"), "compare", ("outputs: does not exist", "run folder (with config.yaml)")),
    Row("metric", None, "compare --metric acuracy", ("--metric: no run has the metric 'acuracy'", "'accuracy'")),
    Row("target in percent", None, "compare --target 85", ("--target: 85 is not an accuracy in (0, 1]", "0.85")),
    Row("config cut in half", cut("RUN/config.yaml", 200), "show RUN",
        ("outputs/runs/RUN/config.yaml: is cut short, though the run is done", "put the original back")),
    Row("config cut in half, compared", cut("RUN/config.yaml", 200), "compare outputs/runs/RUN", ("", "is cut short")),
    Row("config cut in half, trained", cut("RUN/config.yaml", 200), "train TINY baseline=fedavg",
        ("outputs/runs/RUN/config.yaml: is cut short",)),
    Row("config cut within a list", file("RUN/config.yaml", "model: {hidden: [16"), "show RUN",
        ("outputs/runs/RUN/config.yaml: cannot be read", "line 1")),
    Row("no config", gone("RUN/config.yaml"), "export RUN -o x.safetensors",
        ("outputs/runs/RUN/config.yaml: is not there or empty",)),
    Row("config of another run", swapped("RUN/config.yaml", "\nseed: 0", "\nseed: 7"), "export RUN -o x.safetensors",
        ("RUN: is the run RUN, but its config.yaml now gives the run",)),
    Row("status cut short", cut("RUN/status.json", 10), "show RUN", ("outputs/runs/RUN/status.json: cannot be read",)),
    Row("half a line of metrics", cut("RUN/metrics.csv", 500), "show RUN",
        ("outputs/runs/RUN/metrics.csv: line 5 is none of its rows; put the original back",)),
    Row("half a line of metrics, compared", cut("RUN/metrics.csv", 500), "compare outputs/runs/RUN",
        ("", "outputs/runs/RUN/metrics.csv: line 5 is none of its rows")),
    Row("metrics of something else", file("RUN/metrics.csv", "garbage\n"), "show RUN",
        ("outputs/runs/RUN/metrics.csv: its first line names no round and scope",)),
    Row("metrics with a word for a round", swapped("RUN/metrics.csv", "\n1,", "\none,"), "show RUN",
        ("outputs/runs/RUN/metrics.csv: line 2 is none of its rows",)),
    Row("metrics that are no text", file("RUN/metrics.csv", b"\xff\xfe"), "compare",
        ("", "outputs/runs/RUN/metrics.csv: cannot be read", "utf-8")),
    Row("half a line of metrics within", both(unfinished, swapped("RUN/metrics.csv", "\n2,global,", "\n2\n2,global,")),
        "show RUN", ("outputs/runs/RUN/metrics.csv: line ", "is none of its rows")),
    Row("checkpoints cut short", cut("RUN/checkpoints/*.pt", 500), "export RUN -o x.safetensors",
        ("RUN: has no checkpoint left to read", "its checksum does not match", "train it again")),
    Row("checkpoints with other bytes",
        lambda p: [f.write_bytes(f.read_bytes() + b"x") for f in (p.run / "checkpoints").iterdir()],
        "export RUN -o x.safetensors", ("RUN: has no checkpoint left to read", "its checksum does not match")),
    Row("no checkpoint", gone("RUN/checkpoints"), "export RUN -o x.safetensors", ("RUN: has no checkpoint",), 1),
    Row("unknown participant", None, "export RUN -o x.safetensors --participant 17",
        ("--participant: got 17", "nearest valid value: 4")),
    Row("a width it has not", None, "export RUN -o x.safetensors --width 0.5", ("--width: got 0.5", "leave it out")),
]  # fmt: skip
SWEEPS = [
    Row("a range that is empty", None, "train -m TINY seed=range(3,0)", ("seed: 'seed=range(3,0)' matches nothing",)),
    Row("a range of words", None, "train -m TINY seed=range(0,a)", ("seed: cannot read 'seed=range(0,a)'",)),
    Row("a gap in a list", None, "train -m TINY seed=0,,1",
        ("seed: cannot read 'seed=0,,1'", "no space after a comma")),
    Row("a sweep without -m", None, "train TINY seed=0,1", ("seed: got '0,1'", "needs -m")),
    Row("dots for a range", None, "train -m TINY seed=0..3",
        ("in the job", "seed: got '0..3': expected a whole number")),
    Row("a dry sweep", None, "train -m TINY seed=0,1 --dry-run", ("--dry-run: checks one run; leave out -m",)),
    Row("unknown preset", None, "train -m experiment=fedle_digits",
        ("experiment: got 'fedle_digits'", "'feddle_digits'")),
    Row("unknown scale", None, "train -m experiment=feddle_e1_methods scale=hge", ("scale: got 'hge'. ", "cpu, gpu")),
    Row("a scale of a preset without", None, "train -m experiment=feddle_digits scale=cpu",
        ("scale: got 'cpu', but there is no preset, or it has no scales; leave it out",)),
    Row("a preset's sweep of nothing", preset("sweeps: {a: {}}"), "train -m TINY experiment=mine --config-dir c",
        ("sweeps.a.each: a sweep needs values",)),
    Row("a preset's sweep misspelt", preset("scale: a\nsweeps: {a: {each: {seeed: [0, 1]}}}"),
        "train -m TINY experiment=mine --config-dir c", ("seeed: unknown key. Did you mean 'seed'?",)),
    Row("a preset's method misspelt", preset("tuned: {fedvag: {rounds: 3}}"),
        "train TINY experiment=mine --config-dir c", ("tuned.fedvag: unknown method. Did you mean 'fedavg'?",)),
    Row("jobs that are no table", file("SWEEP/runs.csv", b"\xff\xfe"), "compare outputs/sweeps/SWEEP",
        ("", "outputs/sweeps/SWEEP/runs.csv: cannot be read", "the sweep's line makes it anew")),
    Row("jobs of something else", file("SWEEP/runs.csv", "a,b\n1,2\n"), "compare outputs/sweeps/SWEEP",
        ("", "outputs/sweeps/SWEEP/runs.csv: has no jobs")),
]  # fmt: skip
CLAIMS = [
    Row("unknown preset for claims", None, "claims feddle_digit", ("feddle_digit: is no preset", "'feddle_digits'")),
    Row("claims of a file", None, "claims w.yaml", ("w.yaml: is no preset and no folder",)),
    Row("claims of a run", None, "claims outputs/runs/RUN", ("preset: none is given", "feddle_digits")),
    Row("claims with a wrong value", None, "claims feddle_digits rounds=many",
        ("rounds: got 'many': expected a whole number",)),
    Row("a share in percent", None, "claims feddle_digits --confidence 95", ("--confidence: got 95", "0.95")),
    Row("what was typed is no text", file("SWEEP/overrides.txt", b"\xff\xfe"), "claims outputs/sweeps/SWEEP",
        ("outputs/sweeps/SWEEP/overrides.txt: cannot be read",)),
    Row("a claim's key", claim("metrc: loss"), "claims mine --config-dir c",
        ("claims[0].metrc: unknown key. Did you mean 'metric'?",)),
    Row("a claim's metric", claim("metric: los"), "claims mine --config-dir c",
        ("claims[0].metric: got 'los'", "'loss'")),
    Row("a claim's setting", claim("where: {partitoning.alpha: 3}"), "claims mine --config-dir c",
        ("claims[0].where.partitoning.alpha: unknown key", "'partitioning.alpha'")),
    Row("a claim's cell", claim("where: base"), "claims mine --config-dir c",
        ("claims[0].where: got 'base'", "{key: value}")),
    Row("a mapping of claims", preset("claims: {id: a}"), "claims mine --config-dir c",
        ("In 'experiment/mine': ", "Cannot merge DictConfig with ListConfig")),
]  # fmt: skip
PLUGINS = [
    Row("no config folder", None, "train TINY --config-dir c", ("--config-dir: 'c' is not a folder",)),
    Row("a file as config folder", None, "list --config-dir w.yaml", ("--config-dir: 'w.yaml' is not a folder",)),
    Row("a config that is no text", file("c/model/mine.yaml", b"\xff\xfe"), "list --config-dir c",
        ("--config-dir: 'c/model/mine.yaml' cannot be read", "UTF-8")),
    Row("a folder as config", folder("c/model/mine.yaml"), "train TINY --config-dir c model=mine",
        ("--config-dir: 'c/model/mine.yaml' cannot be read", "Is a directory")),
    Row("a module that raises", file("raises_here.py", "raise RuntimeError('boom')\n"),
        "train TINY merging._target_=raises_here.X",
        ("merging._target_: cannot import 'raises_here.X': RuntimeError: boom",)),
    Row("a module that leaves", file("leaves_here.py", "import sys\nsys.exit(3)\n"),
        "train TINY merging._target_=leaves_here.X",
        ("merging._target_: cannot import 'leaves_here.X': SystemExit: 3",)),
    Row("a module with a syntax error", file("broken_here.py", "def X(:\n"),
        "train TINY merging._target_=broken_here.X",
        ("merging._target_: cannot import 'broken_here.X': SyntaxError", "line 1")),
    Row("a module that is not there", file("c/merging/mine.yaml", "_target_: not_here.X\n"),
        f"train {FEW} --config-dir c merging=mine",
        ("merging._target_: cannot import 'not_here.X'", "No module named")),
    Row("a module as a class", None, "train TINY merging._target_=os.path",
        ("merging._target_: 'os.path' is a module",)),
    Row("a reader that gives no data",
        both(file("no_data.py", "class R:\n    def load(self, root):\n        return 3\n"),
             file("c/dataset/mine.yaml", "_target_: no_data.R\n")),
        "train --config-dir c dataset=mine",
        ("dataset._target_: no_data.R.load gave a int", "hybridfl.data.dataset.Dataset")),
    Row("images without Pillow", both(images, without("PIL", "hybridfl.data.image_folder")),
        "train DATA dataset=image_folder", ("dataset._target_: cannot import", "PIL")),
    Row("figures without Matplotlib", without("matplotlib", "hybridfl.figures"), "split TINY --out figures",
        ("matplotlib: is not installed", "pip install matplotlib"), 1),
    Row("weights without safetensors", without("safetensors"), "train TINY start=w.safetensors",
        ("safetensors: is not installed", "pip install safetensors"), 1),
]  # fmt: skip
ROWS = [
    *(*COMMANDS, *KEYS, *SPLITS, *METHODS, *DATASETS, *WEIGHTS),
    *(*FOLDERS, *RUNS, *SWEEPS, *CLAIMS, *PLUGINS),
]


# -- the answers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder with what all mistakes find there, and the names of its run and sweep."""
    root = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(root)
    try:
        run = done(*TINY, "baseline=fedavg")
        sweep = done("-m", *TINY, "baseline=fedavg", "rounds=1", "seed=0,1")
        assert call("export", run.name, "-o", "w.safetensors").status == 0
    finally:
        os.chdir(before)
    return root, run.name, sweep.name


@pytest.fixture
def place(finished: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A copy of it, to be damaged, in which the line is typed."""
    original, run, sweep = finished
    root = tmp_path / "place"
    shutil.copytree(original, root)
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYBRIDFL_DATA", "no-data")
    modules = set(sys.modules)
    yield Place(root, root / "outputs/runs" / run, root / "outputs/sweeps" / sweep, monkeypatch)
    for name in [name for name in set(sys.modules) - modules if name.endswith("_here") or name == "no_data"]:
        del sys.modules[name]


def contents(root: Path) -> dict[str, bytes | None]:
    """Every file with what is in it, and every folder, but for the caches of imported modules."""
    found = [path for path in sorted(root.rglob("*")) if "__pycache__" not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in found}


def refuse(*_: object) -> None:
    raise AssertionError("trained, though the line is wrong")


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_mistake_is_answered_in_one_line_and_nothing_is_lost(place: Place, row: Row) -> None:
    if row.prepare:
        row.prepare(place)
    place.patch.setattr(Engine, "step", refuse)
    names = {**WORDS, "RUN": place.run.name, "SWEEP": place.sweep.name}
    before = contents(place.root)

    def spelt(text: str) -> str:
        for word, meant in names.items():
            text = text.replace(word, meant)
        return text

    answer = call(*shlex.split(spelt(row.line)))
    assert answer.status == row.status, answer.both
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1, answer.err
    assert "Traceback" not in answer.err
    assert len(answer.err) < 900
    begin, *parts = map(spelt, row.parts)
    assert answer.err.startswith(f"hybridfl: {begin}"), answer.err
    for part in parts:
        assert part in answer.err
    assert contents(place.root) == before


def test_rows_have_names_and_lines_of_their_own() -> None:
    assert len(ROWS) > 100
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len({(row.line, id(row.prepare)) for row in ROWS}) == len(ROWS)


def test_the_words_of_the_lines_are_right(place: Place) -> None:
    mnist(place)
    for line in ("train TINY", "train DATA dataset=mnist rounds=1"):
        for word, meant in WORDS.items():
            line = line.replace(word, meant)
        answer = call(*shlex.split(line), "--dry-run")
        assert answer.status == 0, answer.both


def test_every_package_that_is_needed_can_be_named() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    needed = {text.partition(">")[0] for text in project["dependencies"]}
    assert set(PACKAGES.values()) == needed
