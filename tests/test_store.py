"""Run folders: who holds them, what is picked, and writes that survive a kill, a full disk and a closed folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridfl import store
from hybridfl.errors import ConfigError, HybridflError
from hybridfl.store import StoreError, claim, read_status, write_status, write_text_atomic

ROOT = Path(__file__).parent.parent

HOLDER = """
import sys, time
from pathlib import Path
from hybridfl import store
with store.claim(Path(sys.argv[1]), "abc", sys.argv[2:] == ["rerun"], print) as run:
    store.write_status(run.path, status="running")
    print("held", flush=True)
    sys.stdin.readline()
    store.write_status(run.path, status="done", round=3)
"""


def never(message: str) -> None:
    raise AssertionError(f"waited: {message}")


def attempt(output: Path, name: str, status: str | None) -> Path:
    folder = output / "runs" / name
    folder.mkdir(parents=True)
    if status:
        write_status(folder, status=status)
    return folder


def picked(output: Path, rerun: bool) -> str:
    with claim(output, "abc", rerun, never) as run:
        assert run.path.is_dir()
        return run.path.name


def holder(output: Path, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output), *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_importing_the_store_does_not_import_torch() -> None:
    code = "import sys, hybridfl.store, hybridfl.tables; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# -- which folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "rerun", "expected"),
    [
        ({}, False, "abc"),
        ({}, True, "abc"),
        ({"abc": "done"}, False, "abc"),
        ({"abc": "done"}, True, "abc-2"),
        ({"abc": "failed"}, False, "abc"),
        ({"abc": "failed"}, True, "abc-2"),
        ({"abc": None}, False, "abc"),
        ({"abc": "done", "abc-2": "interrupted"}, False, "abc"),
        ({"abc": "done", "abc-2": "interrupted"}, True, "abc-2"),
        ({"abc": "done", "abc-2": None}, True, "abc-2"),
        ({"abc": "done", "abc-2": "done"}, False, "abc-2"),
        ({"abc": "done", "abc-2": "done"}, True, "abc-3"),
        ({"abc": "failed", "abc-2": "running"}, False, "abc-2"),
        ({"abc": "done", "abc-9": "done", "abc-10": "running"}, True, "abc-10"),
        ({"abc": "done", "abc-9": "done", "abc-10": "done"}, False, "abc-10"),
        ({"abcd": "done", "abc-x": "done", "abc-1": "done", "abc-02": "done"}, False, "abc"),
    ],
)
def test_the_attempt_picked(tmp_path: Path, there: dict[str, str | None], rerun: bool, expected: str) -> None:
    for name, status in there.items():
        attempt(tmp_path, name, status)
    assert picked(tmp_path, rerun) == expected


def test_a_run_says_whether_it_is_done_and_where_its_checkpoints_are(tmp_path: Path) -> None:
    with claim(tmp_path, "abc", False, never) as run:
        assert not run.done
        assert run.checkpoints == tmp_path / "runs" / "abc" / "checkpoints"
        write_status(run.path, status="done")
        assert run.done


def test_claiming_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    folder = attempt(tmp_path, "abc", "running")
    (folder / ".config.yaml.123.tmp").write_text("half")
    assert picked(tmp_path, False) == "abc"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "status.json"]


def test_an_error_inside_the_block_passes_unchanged_and_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), claim(tmp_path, "abc", False, never):
        raise OSError("mine")
    assert picked(tmp_path, False) == "abc"


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match=r"^output_dir: cannot write to '.*file/runs' \(Not a directory\)"):
        picked(tmp_path / "file", False)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_file_in_the_place_of_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "abc").write_text("precious")
    with pytest.raises(StoreError, match=r"runs/abc: File exists"):
        picked(tmp_path, False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_closed_output_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        picked(tmp_path, False)


def test_a_finished_run_that_cannot_be_locked_can_still_be_read(tmp_path: Path) -> None:
    done, broken = attempt(tmp_path, "abc", "done"), attempt(tmp_path, "xyz", "failed")
    for folder in (done, broken):
        (folder / ".lock").mkdir()  # stands for a read-only disk, which root would not notice
    with claim(tmp_path, "abc", False, never) as run:
        assert run.done
    with pytest.raises(StoreError, match=r"Cannot lock .*xyz"), claim(tmp_path, "xyz", False, never):
        pass


# -- two processes ---------------------------------------------------------------------------------------------------


def test_a_second_process_waits_and_then_sees_the_run_done(tmp_path: Path) -> None:
    messages: list[str] = []
    with holder(tmp_path) as process:

        def let_go(message: str) -> None:
            messages.append(message)
            process.communicate("go\n")

        with claim(tmp_path, "abc", False, let_go) as run:
            assert read_status(run.path) == {"status": "done", "round": 3}
            assert run.done
    assert len(messages) == 1
    assert str(tmp_path / "runs" / "abc") in messages[0]


def test_kill_9_of_the_holder_frees_the_folder(tmp_path: Path) -> None:
    with holder(tmp_path) as process, claim(tmp_path, "abc", False, lambda _: process.kill()) as run:
        assert process.wait() == -signal.SIGKILL
        assert read_status(run.path) == {"status": "running"}


def test_waiting_can_be_interrupted(tmp_path: Path) -> None:
    with holder(tmp_path) as first, holder_that_waits(tmp_path) as second:
        assert second.stdout is not None
        assert "waiting" in second.stdout.readline()
        second.send_signal(signal.SIGINT)
        _, errors = second.communicate(timeout=10)
        assert "KeyboardInterrupt" in errors
        assert second.returncode != 0
        first.communicate("go\n")


def holder_that_waits(output: Path) -> subprocess.Popen[str]:
    code = HOLDER.replace(", print)", ", lambda message: print(message, flush=True))")
    arguments = [sys.executable, "-c", code, str(output)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_many_processes_starting_together_take_turns(tmp_path: Path) -> None:
    code = HOLDER.replace("sys.stdin.readline()", "time.sleep(0.05); assert not (run.path / 'in').exists()").replace(
        'print("held", flush=True)',
        "file = run.path / 'turns'; assert not (run.path / 'in').exists(); (run.path / 'in').touch(); "
        "file.open('a').write('x'); (run.path / 'in').unlink()",
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    assert (tmp_path / "runs" / "abc" / "turns").read_text() == "xxxx"


def test_a_rerun_waits_for_the_rerun_under_way_and_takes_its_result(tmp_path: Path) -> None:
    attempt(tmp_path, "abc", "done")
    with (
        holder(tmp_path, "rerun") as process,
        claim(tmp_path, "abc", True, lambda _: process.communicate("go\n")) as run,  # type: ignore[arg-type]
    ):
        assert run.path.name == "abc-2"
        assert run.done


def test_a_finished_run_is_not_waited_for_while_its_rerun_is_under_way(tmp_path: Path) -> None:
    attempt(tmp_path, "abc", "done")
    with holder(tmp_path, "rerun") as process:
        assert picked(tmp_path, False) == "abc"
        process.communicate("go\n")
    assert picked(tmp_path, False) == "abc-2"


# -- status, text, log -----------------------------------------------------------------------------------------------


def test_a_status_comes_back_and_is_replaced_as_a_whole(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_status(tmp_path, status="failed", error="Größe")
    assert read_status(tmp_path) == {"status": "failed", "error": "Größe"}
    write_status(tmp_path, status="running", round=3)
    assert read_status(tmp_path) == {"status": "running", "round": 3}


@pytest.mark.parametrize("content", [b"", b'{"status": "do', b"[1]", b"\xff\xfe", b"\0\0\0\0"])
def test_a_torn_status_counts_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status.json").write_bytes(content)
    assert read_status(tmp_path) is None


def test_a_status_that_cannot_be_read_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()
    with pytest.raises(StoreError, match=r"Cannot read .*status\.json"):
        read_status(tmp_path)


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    write_status(tmp_path, round=0)
    code = """
import sys
from pathlib import Path
from hybridfl import store
for round in range(1, 10**9):
    store.write_status(Path(sys.argv[1]), round=round, fill="x" * 10_000)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) as process:
        deadline = time.monotonic() + 10
        while (read_status(tmp_path) or {"round": 0})["round"] < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
    status = read_status(tmp_path)
    assert status is not None
    assert status["round"] >= 5
    assert len(status["fill"]) == 10_000


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_write_stopped_at_any_step_leaves_the_old_file_and_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write_text_atomic(tmp_path / "config.yaml", "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, step, interrupted)
        write_text_atomic(tmp_path / "config.yaml", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "old"


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_text_atomic(tmp_path / "config.yaml", "x")
    assert (tmp_path / "config.yaml").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_log_has_a_time_on_each_entry(tmp_path: Path) -> None:
    store.log(tmp_path, "started")
    store.log(tmp_path, "failed:\n  because")
    first, second, third = (tmp_path / "log.txt").read_text().splitlines()
    stamp, text = first.split(" ", 1)
    assert time.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ")
    assert text == "started"
    assert second.endswith("Z failed:")
    assert third == "      because"


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log(tmp_path: Path) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(StoreError, match=r"Cannot write .*log\.txt: No space left on device\. Everything .* kept"):
        store.log(tmp_path, "a line")


def test_a_disk_that_fills_up_keeps_what_was_there(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from hybridfl import store
folder = Path(sys.argv[1])
store.write_status(folder, round=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store.log(folder, "fits")
for write in (lambda: store.write_status(folder, fill="x" * 2000), lambda: store.log(folder, "x" * 2000)):
    try:
        write()
    except store.StoreError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    first, second = run.stdout.splitlines()
    assert "status.json: File too large" in first
    assert "log.txt: File too large" in second
    assert read_status(tmp_path) == {"round": 1}
    assert "fits" in (tmp_path / "log.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "status.json"]


def test_a_store_error_is_one_for_people() -> None:
    assert issubclass(StoreError, HybridflError)
    assert StoreError("x").exit_status == 1
