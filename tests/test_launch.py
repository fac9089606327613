"""One-line errors, run folders that are never overwritten, and the cores of the machine."""

import os

import pytest
import torch

from timm_mfd.launch import new_run_dir, one_line_errors, use_idle_cores


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


def test_a_run_folder_is_new_or_empty(tmp_path):
    assert new_run_dir(str(tmp_path / "new"), "x") == tmp_path / "new"
    assert new_run_dir(str(tmp_path), "x") == tmp_path
    assert new_run_dir(None, "local-dir:a/b c-mfd1").name.startswith("local-dir-a-b-c-mfd1-")
    (tmp_path / "file").write_text("keep")
    with pytest.raises(FileExistsError, match="is not an empty folder; nothing was changed"):
        new_run_dir(str(tmp_path), "x")
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds another run"):
        new_run_dir(str(tmp_path), "x")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        new_run_dir(str(tmp_path / "file"), "x")


def test_the_launchers_single_thread_is_undone_and_a_chosen_number_is_kept(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    use_idle_cores(1)
    assert chosen == []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    use_idle_cores(2)
    assert chosen == [4]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    use_idle_cores(1)
    assert chosen == [4]
