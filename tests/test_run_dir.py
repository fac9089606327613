"""Run folders: claimed once, held while they are written, found again."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import timm
import torch
from processes import CONTEXT, start_process

from timm_mfd import run_dir


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def begin(path, name="run", finished=False, when=0):
    """A run folder with a checkpoint."""
    path = Path(path)
    (path / "checkpoint").mkdir(parents=True)
    (path / "args.json").write_text(json.dumps({"name": name}))
    (path / run_dir.CHECKPOINT).write_text("state")
    os.utime(path / "args.json", (when, when))
    if finished:
        (path / "summary.json").write_text("{}")
    return path / run_dir.CHECKPOINT


def test_a_run_claims_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    names = [run_dir.claim(None, "local-dir:a/b c-mfd1", {"a": 1}).name for _ in range(3)]
    assert names == ["local-dir-a-b-c-mfd1-now", "local-dir-a-b-c-mfd1-now-1", "local-dir-a-b-c-mfd1-now-2"]
    assert json.loads((tmp_path / "runs" / names[2] / "args.json").read_text()) == {"a": 1}
    (tmp_path / "empty").mkdir()
    assert run_dir.claim("empty", "x", {}) == Path("empty")


def test_a_folder_that_holds_something_is_refused_and_untouched(tmp_path):
    file = tmp_path / "file"
    file.write_text("keep")
    for folder in (tmp_path, file):
        for resume in (False, True):
            with pytest.raises(FileExistsError, match="is not an empty folder; nothing was changed"):
                run_dir.claim(str(folder), "x", {}, resume)
    (tmp_path / "args.json").write_text("mine")
    with pytest.raises(FileExistsError, match="holds another run"):
        run_dir.claim(str(tmp_path), "x", {})
    assert (file.read_text(), (tmp_path / "args.json").read_text()) == ("keep", "mine")
    with pytest.raises(OSError, match="cannot make --output-dir .*/file/below: .*; choose another one$"):
        run_dir.claim(str(file / "below"), "x", {})


def test_a_run_cut_off_before_its_first_checkpoint_begins_again_only_when_asked():
    Path("cut/checkpoint").mkdir(parents=True)
    Path("cut/args.json").write_text('{"half')
    with pytest.raises(FileExistsError, match="holds another run"):
        run_dir.claim("cut", "x", {"new": 1})
    assert run_dir.find_checkpoint("auto", "cut", "x") is None
    run_dir.claim("cut", "x", {"new": 1}, resume=True)
    assert json.loads(Path("cut/args.json").read_text()) == {"new": 1}


@pytest.mark.parametrize("left", ["args.json.partial", "metrics.jsonl", "metrics.jsonl.partial", "nonfinite.json"])
def test_whatever_a_kill_left_before_the_first_checkpoint_is_no_obstacle(left):
    Path("cut/checkpoint").mkdir(parents=True)
    Path("cut", left).write_text("half")
    run_dir.claim("cut", "x", {}, resume=True)
    assert not {"metrics.jsonl", "nonfinite.json"} & {path.name for path in Path("cut").iterdir()}


def test_a_run_with_a_checkpoint_is_never_begun_again():
    begin("other")
    before = Path("other/args.json").read_text()
    with pytest.raises(FileExistsError, match="holds another run; nothing was changed, .* go on with --resume auto"):
        run_dir.claim("other", "x", {}, resume=True)
    assert Path("other/args.json").read_text() == before


def hold(folder, held, seconds):
    run_dir.hold(folder)
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
    run_dir.hold(Path("busy"))


def test_a_folder_that_another_process_writes_is_refused_until_that_one_dies():
    begin("busy")
    process = held_by_another_process("busy", seconds=60)
    with pytest.raises(FileExistsError, match="busy: another process writes into this run; nothing was changed"):
        run_dir.hold(Path("busy"), patience=0.2)
    process.kill()
    run_dir.hold(Path("busy"))


def test_a_run_that_was_removed_is_held_anew():
    begin("busy")
    run_dir.hold(Path("busy"))
    shutil.rmtree("busy")
    begin("busy")
    run_dir.hold(Path("busy"))
    assert Path("busy/checkpoint/lease").exists()


def hold_by_lease_alone(folder, held, seconds):
    """As where the system's locks end at the node."""
    run_dir._lock_in_kernel = lambda *_: True
    run_dir._LEASE = 0.9
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
    monkeypatch.setattr(run_dir, "_lock_in_kernel", lambda *_: True)
    monkeypatch.setattr(run_dir, "_LEASE", 0.9)
    with pytest.raises(FileExistsError, match="busy: another process writes into this run; nothing was changed"):
        run_dir.hold(Path("busy"), patience=0.5)
    os.kill(process.pid, signal.SIGSTOP)
    run_dir.hold(Path("busy"))
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 1


def test_auto_finds_the_run_of_the_output_folder_or_the_newest_unfinished_one_of_that_name():
    assert run_dir.find_checkpoint("auto", None, "m-seed1") is None
    begin("runs/m-seed1-old", when=1)
    newest = begin("runs/m-seed1-new", when=3)
    begin("runs/m-seed1-done", finished=True, when=4)
    begin("runs/m-seed10-x", when=5)
    (Path("runs/m-seed1-bare")).mkdir()
    assert run_dir.find_checkpoint("auto", None, "m-seed1") == newest
    chosen = begin("chosen")
    assert run_dir.find_checkpoint("auto", "chosen", "m-seed1") == chosen
    assert run_dir.find_checkpoint("auto", "nowhere", "m-seed1") is None


def test_a_path_may_be_the_run_its_checkpoint_folder_or_the_file():
    checkpoint = begin("run")
    for path in ("run", "run/checkpoint", "run/checkpoint/state.safetensors"):
        assert run_dir.find_checkpoint(path, None, "x") == checkpoint
    with pytest.raises(ValueError, match="--resume nowhere: no checkpoint there, expected a run folder"):
        run_dir.find_checkpoint("nowhere", None, "x")


def test_a_run_goes_on_in_its_own_folder_unless_another_is_chosen(tmp_path):
    checkpoint = begin("run")
    assert run_dir.to_go_on_in(checkpoint, None) == Path("run")
    assert run_dir.to_go_on_in(checkpoint, str(tmp_path / "run")) == Path("run")
    assert run_dir.to_go_on_in(checkpoint, "other") is None
    Path("copy.safetensors").write_text("state")
    assert run_dir.to_go_on_in(Path("copy.safetensors"), None) is None


def test_changes_name_the_flag_and_both_values():
    now, before = {"lr": 0.1, "stages": (0, 1), "seed": 3, "new": 1}, {"lr": 0.2, "stages": [0, 1], "seed": 4, "old": 1}
    assert run_dir.changes(now, before, ignore={"seed"}) == {"lr": "--lr 0.1 (was 0.2)"}


def test_the_environment_names_versions_device_and_commit():
    run_dir._commit.cache_clear()  # somebody may have committed since this process asked
    found = run_dir.environment(torch.device("cpu"), 2)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert (found["device_type"], found["processes"], found["cpu_threads"]) == ("cpu", 2, torch.get_num_threads())
    repository = Path(run_dir.__file__).parents[1]
    if (repository / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True)
        assert found["git_commit"] == head.stdout.strip()
        assert found["git_modified"] in (True, False)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processes": 4}, "cannot resume on another number of processes: 4 now, 2 when the run began"),
        ({"device_type": "cuda"}, "cannot resume on another kind of device: cuda now, cpu when the run began"),
    ],
)
def test_another_number_of_processes_or_kind_of_device_is_refused(change, message):
    was = run_dir.environment(torch.device("cpu"), 2)
    assert run_dir.check_same(was, "d", {"environment": was, "data": "d"}) == ""
    with pytest.raises(ValueError, match=message):
        run_dir.check_same(was | change, "d", {"environment": was, "data": "d"})
    with pytest.raises(ValueError, match="the data set is not the one that the run began with"):
        run_dir.check_same(was, "d", {"environment": was, "data": "e"})


def test_another_version_is_named():
    was = run_dir.environment(torch.device("cpu"), 1)
    now = was | {"packages": was["packages"] | {"timm": "9.9"}, "cpu_threads": 77}
    differs = run_dir.check_same(now, "d", {"environment": was, "data": "d"})
    assert differs == f"cpu_threads 77 (was {torch.get_num_threads()}), timm 9.9 (was {timm.__version__})"


def test_a_whole_folder_takes_the_place_of_what_an_interruption_left():
    for name, text in (("model", "half"), ("model.partial", "whole")):
        Path(name).mkdir()
        (Path(name) / "file").write_text(text)
    run_dir.replace_folder(Path("model.partial"), Path("model"))
    assert Path("model/file").read_text() == "whole"
    assert not Path("model.partial").exists()


def test_json_refuses_what_other_readers_cannot_read():
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_dir.to_json({"loss": float("nan")})
