"""A file holds its old content or its new one, and nothing else is left behind."""

import os
import time

import pytest

from timm_mfd.atomic import new_folder, replace_folder, replacing, to_json


@pytest.mark.parametrize("shared", [False, True])
def test_the_new_content_replaces_the_old(tmp_path, shared):
    path = tmp_path / "file"
    for text in ("old", "new"):
        with replacing(path, shared) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_content(tmp_path, shared, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), replacing(path, shared) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_written_over_or_removed(tmp_path):
    (tmp_path / "file.partial").write_text("a long half that was left behind")
    with replacing(tmp_path / "file") as partial:
        partial.write_text("new")
    assert (tmp_path / "file").read_text() == "new"
    for name, age in (("old", 7200), ("young", 60)):
        (tmp_path / f"file.{name}.partial").write_text("half")
        os.utime(tmp_path / f"file.{name}.partial", (time.time() - age,) * 2)
    with replacing(tmp_path / "file", shared=True) as partial:
        partial.write_text("newer")
    assert sorted(os.listdir(tmp_path)) == ["file", "file.young.partial"]


def test_the_content_is_on_the_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    with replacing(tmp_path / "file") as partial:
        partial.write_text("x")
    assert calls == ["fsync", "replace", "fsync"]


def test_the_mode_is_that_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "file") as partial:
        partial.write_text("x")
        partial.chmod(0o600)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_new_folder_appears_when_it_is_complete_and_takes_nobodys_place(tmp_path):
    (tmp_path / "out").mkdir()  # empty
    with new_folder(tmp_path / "out") as new:
        (new / "ours.txt").touch()
        assert not list((tmp_path / "out").iterdir())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ours.txt"]
    filled = pytest.raises(FileExistsError, match="has been filled by somebody else meanwhile")
    with filled, new_folder(tmp_path / "out") as new:
        (new / "more.txt").touch()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "deep" / "er"):
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "ours.txt", "out"]


def test_a_whole_folder_takes_the_place_of_what_an_interruption_left(tmp_path):
    for name, text in (("model", "half"), ("model.partial", "whole")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    replace_folder(tmp_path / "model.partial", tmp_path / "model")
    assert (tmp_path / "model/file").read_text() == "whole"
    assert not (tmp_path / "model.partial").exists()


def test_json_refuses_what_other_readers_cannot_read():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"loss": float("nan")})
