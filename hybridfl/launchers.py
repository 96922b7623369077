"""Who does the jobs of a sweep: the choices of ``hydra/launcher=`` and their options, ``hydra.launcher.…``.

The words are those of Hydra's plug-ins for joblib and submitit. The plug-ins themselves are not used: they hand a whole batch to
a pool that gives all of it up when one process dies, and their jobs know nothing of each other's data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from shutil import which
from typing import Annotated, Any

from hybridfl.build import PositiveFloat, PositiveInt, Range, call
from hybridfl.errors import ConfigError, nearest


@dataclass(frozen=True)
class Basic:
    """One process, in order."""


@dataclass(frozen=True)
class Joblib:
    """Worker processes on this machine.

    Attributes:
        n_jobs: of them; -1 is as many as the cores suffice for, -2 leaves one core to others, and so on.
    """

    n_jobs: int = -1

    def __post_init__(self) -> None:
        if self.n_jobs == 0:
            raise ConfigError("n_jobs", "got 0; nearest valid values: 1, or -1 for as many as the cores suffice for.")


@dataclass(frozen=True)
class SubmititLocal:
    """A process by itself for every job, on this machine, as submitit starts them.

    Attributes:
        timeout_min: minutes after which a job is ended; the same line continues it.
        cpus_per_task: cores of a job; ``None`` takes what its executor uses.
        gpus_per_node: GPUs of a job; ``None`` is none on a machine without any, else one.
        mem_gb: memory of a job; asked for on a cluster only.
        name: of the jobs.
        stderr_to_stdout: one log a job instead of two.
        setup: shell commands before a job.
    """

    timeout_min: PositiveInt = 60
    cpus_per_task: PositiveInt | None = None
    gpus_per_node: Annotated[int, Range(low=0)] | None = None
    mem_gb: PositiveFloat | None = None
    name: str = "hybridfl"
    stderr_to_stdout: bool = False
    setup: tuple[str, ...] = ()


@dataclass(frozen=True)
class SubmititSlurm(SubmititLocal):
    """A Slurm job for every job; see submitit and ``sbatch`` for what the options ask for.

    Attributes:
        array_parallelism: jobs that are with Slurm at a time.
        max_num_timeout: how often a job that was ended for its time is queued again, where it goes on from its checkpoint.
        signal_delay_s: seconds before its end at which a job is told.
        additional_parameters: further options of ``sbatch``.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    exclude: str | None = None
    comment: str | None = None
    array_parallelism: PositiveInt = 256
    max_num_timeout: Annotated[int, Range(low=0)] = 0
    signal_delay_s: PositiveInt = 120
    srun_args: tuple[str, ...] = ()
    additional_parameters: dict[str, Any] = field(default_factory=dict)


Launcher = Basic | Joblib | SubmititLocal
LAUNCHERS: Mapping[str, type[Launcher]] = {
    "basic": Basic,
    "joblib": Joblib,
    "submitit_local": SubmititLocal,
    "submitit_slurm": SubmititSlurm,
}


def launcher(name: str, options: Mapping[str, Any]) -> Launcher:
    """The launcher of this name.

    Raises:
        ConfigError: there is none such, an option is wrong, or the extra that it needs is not installed.
    """
    if name not in LAUNCHERS:
        raise ConfigError("hydra/launcher", f"got '{name}'. {nearest(name, LAUNCHERS)}")
    made: Launcher = call(LAUNCHERS[name], options, "hydra.launcher", {})
    if name != "basic":
        need_extra(name.partition("_")[0], f"hydra/launcher={name}")
    if isinstance(made, SubmititSlurm) and which("srun") is None:
        problem = "got 'submitit_slurm', and this machine has no srun: type the line where Slurm is"
        raise ConfigError("hydra/launcher", f"{problem}; nearest valid choice: submitit_local.")
    return made


def need_extra(module: str, word: str) -> None:
    """Refuse what was typed if the extra for it, named as its module, is not installed.

    Raises:
        ConfigError: it is not; says how to install it.
    """
    if find_spec(module) is None:
        key, _, value = word.partition("=")
        problem = f"got '{value}', which needs the extra '{module}': pip install 'hybridfl[{module}]'"
        raise ConfigError(key, f"{problem}; nearest valid choice: basic.")
