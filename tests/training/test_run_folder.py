"""Run folders: taken once, locked while they are written, found again, and read in one place."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from processes import CONTEXT, start_process

from timm_mfd.training import lock
from timm_mfd.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


CHECKPOINT = "checkpoint/state.safetensors"


def begin(path, name="run", finished=False, when=0):
    """A run folder with a checkpoint."""
    path = Path(path)
    (path / "checkpoint").mkdir(parents=True)
    (path / "args.json").write_text(json.dumps({"name": name}))
    (path / CHECKPOINT).write_text("state")
    os.utime(path / "args.json", (when, when))
    if finished:
        (path / "summary.json").write_text("{}")
    return path


def test_a_run_claims_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    names = [RunFolder.create(None, "local-dir:a/b c-mfd1", {"a": 1}).path.name for _ in range(3)]
    assert names == ["local-dir-a-b-c-mfd1-now", "local-dir-a-b-c-mfd1-now-1", "local-dir-a-b-c-mfd1-now-2"]
    assert json.loads((tmp_path / "runs" / names[2] / "args.json").read_text()) == {"a": 1}
    (tmp_path / "empty").mkdir()
    assert RunFolder.create("empty", "x", {}).path == Path("empty")


def test_a_folder_that_holds_something_is_refused_and_untouched(tmp_path):
    file = tmp_path / "file"
    file.write_text("keep")
    for folder in (tmp_path, file):
        for resume in (False, True):
            with pytest.raises(FileExistsError, match="is not an empty folder; nothing was changed"):
                RunFolder.create(str(folder), "x", {}, resume)
    (tmp_path / "args.json").write_text("mine")
    with pytest.raises(FileExistsError, match="holds another run"):
        RunFolder.create(str(tmp_path), "x", {})
    assert (file.read_text(), (tmp_path / "args.json").read_text()) == ("keep", "mine")
    with pytest.raises(OSError, match="cannot make --output-dir .*/file/below: .*; choose another one$"):
        RunFolder.create(str(file / "below"), "x", {})


def test_a_run_cut_off_before_its_first_checkpoint_begins_again_only_when_asked():
    Path("cut/checkpoint").mkdir(parents=True)
    Path("cut/args.json").write_text('{"half')
    with pytest.raises(FileExistsError, match="holds another run"):
        RunFolder.create("cut", "x", {"new": 1})
    assert to_resume("auto", "cut", "x") is None
    RunFolder.create("cut", "x", {"new": 1}, resume=True)
    assert json.loads(Path("cut/args.json").read_text()) == {"new": 1}


@pytest.mark.parametrize("left", ["args.json.partial", "metrics.jsonl", "metrics.jsonl.partial", "nonfinite.json"])
def test_whatever_a_kill_left_before_the_first_checkpoint_is_no_obstacle(left):
    Path("cut/checkpoint").mkdir(parents=True)
    Path("cut", left).write_text("half")
    RunFolder.create("cut", "x", {}, resume=True)
    assert not {"metrics.jsonl", "nonfinite.json"} & {path.name for path in Path("cut").iterdir()}


def test_a_run_with_a_checkpoint_is_never_begun_again():
    begin("other")
    before = Path("other/args.json").read_text()
    with pytest.raises(FileExistsError, match=r"holds another run; nothing .* resume it with --resume auto"):
        RunFolder.create("other", "x", {}, resume=True)
    assert Path("other/args.json").read_text() == before


def to_resume(*args):
    found = RunFolder.to_resume(*args)
    return found and found.path


def hold(folder, held, seconds):
    RunFolder(folder).lock()
    held.set()
    time.sleep(seconds)


def held_by_another_process(folder, seconds):
    held = CONTEXT.Event()
    process = start_process(hold, Path(folder).resolve(), held, seconds)
    assert held.wait(60)
    return process


def test_a_process_that_still_saves_is_waited_for():
    begin("busy")
    held_by_another_process("busy", seconds=0.5)
    RunFolder("busy").lock()


def test_a_folder_that_another_process_writes_is_refused_until_that_one_dies():
    begin("busy")
    process = held_by_another_process("busy", seconds=60)
    with pytest.raises(FileExistsError, match="busy: another process writes into this run; nothing was changed"):
        RunFolder("busy").lock(patience=0.2)
    process.kill()
    RunFolder("busy").lock()


def test_a_run_that_was_removed_is_held_anew():
    begin("busy")
    RunFolder("busy").lock()
    shutil.rmtree("busy")
    begin("busy")
    RunFolder("busy").lock()
    assert Path("busy/checkpoint/lease").exists()


def hold_by_lease_alone(folder, held, seconds):
    """As where the system's locks end at the node."""
    lock._lock_in_kernel = lambda *_: True
    lock.LEASE = 0.9
    hold(folder, held, seconds)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="POSIX signals")
def test_a_process_on_another_node_holds_its_run_until_it_gives_no_sign_of_life_and_then_has_lost_it(monkeypatch):
    begin("busy")
    held = CONTEXT.Event()
    process = start_process(hold_by_lease_alone, Path("busy").resolve(), held, 60)
    assert held.wait(60)
    lease = Path("busy/checkpoint/lease")
    with lease.open("r+") as file:  # the same file: its owner still touches it
        text = file.read()
        file.seek(0)
        file.write(re.sub("(?m)^host=.*$", "host=node2", text))
        file.truncate()
    monkeypatch.setattr(lock, "_lock_in_kernel", lambda *_: True)
    monkeypatch.setattr(lock, "LEASE", 0.9)
    with pytest.raises(FileExistsError, match="busy: another process writes into this run; nothing was changed"):
        RunFolder("busy").lock(patience=0.5)
    os.kill(process.pid, signal.SIGSTOP)
    RunFolder("busy").lock()
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 1


def test_of_two_runs_that_begin_in_a_folder_at_once_the_second_is_refused_while_the_first_one_runs(monkeypatch):
    Path("busy").mkdir()
    process = held_by_another_process("busy", seconds=60)
    real = RunFolder.lock
    monkeypatch.setattr(RunFolder, "lock", lambda self: real(self, patience=0.2))
    with pytest.raises(FileExistsError, match="busy: another process writes into this run"):
        RunFolder.create("busy", "x", {}, resume=True)
    assert not Path("busy/args.json").exists()
    process.kill()
    process.join()
    RunFolder.create("busy", "x", {}, resume=True)


def test_of_two_runs_that_begin_in_a_folder_at_once_the_second_is_refused_after_the_first_one_ended(monkeypatch):
    monkeypatch.setattr(RunFolder, "lock", lambda self: begin("other"))  # while this one waits for the lock
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="holds another run; nothing was changed"):
            RunFolder.create("other", "x", {"mine": 1}, resume=resume)
        assert json.loads(Path("other/args.json").read_text()) == {"name": "run"}
        shutil.rmtree("other")


def test_auto_finds_the_run_of_the_output_folder_or_the_newest_unfinished_one_of_that_name():
    assert to_resume("auto", None, "m-seed1") is None
    begin("runs/m-seed1-old", when=1)
    newest = begin("runs/m-seed1-new", when=3)
    begin("runs/m-seed1-done", finished=True, when=4)
    begin("runs/m-seed10-x", when=5)
    (Path("runs/m-seed1-bare")).mkdir()
    assert to_resume("auto", None, "m-seed1") == newest
    chosen = begin("chosen")
    assert to_resume("auto", "chosen", "m-seed1") == chosen
    assert to_resume("auto", "nowhere", "m-seed1") is None


def test_a_path_is_a_run_folder_with_a_checkpoint():
    begin("run")
    assert to_resume("run", None, "x") == Path("run")
    for path in ("nowhere", "run/checkpoint", f"run/{CHECKPOINT}"):
        with pytest.raises(ValueError, match=f"--resume {path}: no checkpoint there, expected a run folder with"):
            to_resume(path, None, "x")


def test_a_finished_run_without_its_state_is_found_by_name_only():
    begin("runs/m-seed1-done", finished=True)
    Path("runs/m-seed1-done", CHECKPOINT).unlink()
    assert to_resume("runs/m-seed1-done", None, "x") == Path("runs/m-seed1-done")
    assert to_resume("auto", "runs/m-seed1-done", "x") == Path("runs/m-seed1-done")
    assert to_resume("auto", None, "m-seed1") is None


def test_a_run_is_meant_by_its_folder_or_by_that_of_its_model():
    begin("run")
    for name in ("run", "run/model", "local-dir:run/model"):
        assert RunFolder.of(name).path == Path("run")
    for name in ("resnet18_mfd", "nowhere", "run/checkpoint/x"):
        assert RunFolder.of(name) is None


def test_what_a_run_says_is_read_once_and_in_one_place():
    run = RunFolder("run")
    run.path.mkdir()
    assert (run.is_begun, run.is_finished, run.metrics) == (False, False, [])
    with pytest.raises(ValueError, match=r"run is no run, or it is damaged: args.json is missing"):
        _ = run.args
    with pytest.raises(ValueError, match=r"run is not a finished run: summary.json is missing"):
        run.check_finished()
    with pytest.raises(ValueError, match="nowhere does not exist or is not a folder"):
        RunFolder("nowhere").check_finished()
    (run.path / "args.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"lr": 0.1}).encode())  # as an editor saved it
    run.write_metrics([{"epoch": 1, "seconds": 2.0}, {"epoch": 2, "seconds": 0.5}])
    run.write_summary({"top1": 50.0})
    run.check_finished()
    assert run.facts == {"args": {"lr": 0.1}, "summary": {"top1": 50.0}, "seconds": 2.5}
    run.write_summary({"top1": 60.0})
    assert run.summary["top1"] == 60.0, "what was written is what is read"


@pytest.mark.parametrize(
    ("file", "read"), [("args.json", "args"), ("summary.json", "summary"), ("metrics.jsonl", "metrics")]
)
@pytest.mark.parametrize("content", [b"{half", b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(file, read, content):
    Path("run").mkdir()
    Path("run", file).write_bytes(content)
    with pytest.raises(ValueError, match=f"run/{file} is damaged"):
        getattr(RunFolder("run"), read)


def test_resuming_notes_what_was_changed():
    run = RunFolder.create("run", "x", {"lr": 0.1, "workers": 2})
    run.note_changes({"lr": 0.1, "workers": 2})
    assert "history" not in json.loads(Path("run/args.json").read_text())
    run.note_changes({"lr": 0.1, "workers": 0})
    assert json.loads(Path("run/args.json").read_text()) == {
        "lr": 0.1, "workers": 0, "history": [{"lr": 0.1, "workers": 2}],
    }  # fmt: skip
