"""One-line errors, run folders that are never overwritten, and the cores of the machine."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from timm_mfd.launch import claim_run_dir, one_line_errors, prepare_cpu, to_json


def test_user_errors_become_one_line_and_exit_code_one(capsys):
    with pytest.raises(SystemExit) as exit_, one_line_errors(ValueError):
        raise ValueError("the bad value")
    assert str(exit_.value.code).endswith(": error: the bad value")


def test_an_error_out_of_a_decoding_process_loses_that_processs_traceback():
    with pytest.raises(SystemExit) as exit_, one_line_errors(ValueError):
        raise ValueError(
            "Caught it in worker 0.\nTraceback:\n  File\ntimm_mfd.x.ImageDecodeError: cannot decode a.png\n"
        )
    assert str(exit_.value.code).endswith("error: cannot decode a.png")


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors(ValueError):
        _ = 1 / 0


def test_a_run_claims_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    names = [claim_run_dir(None, "local-dir:a/b c-mfd1", {"a": 1}).name for _ in range(3)]
    assert names == ["local-dir-a-b-c-mfd1-now", "local-dir-a-b-c-mfd1-now-1", "local-dir-a-b-c-mfd1-now-2"]
    assert json.loads((tmp_path / "runs" / names[2] / "args.json").read_text()) == {"a": 1}
    (tmp_path / "empty").mkdir()
    assert claim_run_dir("empty", "x", {}) == Path("empty")


def test_a_folder_that_holds_something_is_refused_and_untouched(tmp_path):
    file = tmp_path / "file"
    file.write_text("keep")
    for folder in (tmp_path, file):
        with pytest.raises(FileExistsError, match="is not an empty folder; nothing was changed"):
            claim_run_dir(str(folder), "x", {})
    (tmp_path / "args.json").write_text("mine")
    with pytest.raises(FileExistsError, match="holds another run"):
        claim_run_dir(str(tmp_path), "x", {})
    assert (file.read_text(), (tmp_path / "args.json").read_text()) == ("keep", "mine")


def test_json_refuses_what_other_readers_cannot_read():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"loss": float("nan")})


def test_an_interruption_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_, one_line_errors(ValueError):
        raise KeyboardInterrupt
    assert str(exit_.value.code).endswith(": interrupted")


def test_the_launchers_single_thread_is_undone_and_a_chosen_number_is_kept(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    prepare_cpu()
    assert chosen == []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    prepare_cpu()
    assert chosen == [4]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    prepare_cpu()
    assert chosen == [4]
