"""The script for a machine with a GPU: what it runs, in which order and within which time."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / ".ci" / "gpu"


def run(tmp_path, python, *arguments):
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{python}\n')
    stand_in.chmod(0o755)
    command = [SCRIPT, "30", tmp_path / "out", *arguments]
    environment = os.environ | {"PYTHON": str(stand_in)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    return done, (tmp_path / "calls").read_text().splitlines()


def test_tests_then_benchmark_then_rows_within_the_time(tmp_path):
    done, (tests, benchmark, training) = run(tmp_path, "echo fine", "--rows", "mobilenetv2/tiny_imagenet")
    assert done.returncode == 0
    assert tests == "-m pytest -q -o addopts= tests/test_cuda.py"
    assert benchmark.startswith("train_scripts/benchmark.py --dtype bf16")
    assert training.startswith("train_scripts/reproduce.py run --rows mobilenetv2/tiny_imagenet")
    assert training.endswith("--time-limit 30") or training.endswith("--time-limit 29")
    assert (tmp_path / "out" / "tests.log").read_text() == "fine\n"


def test_a_part_that_fails_keeps_none_from_running_and_is_told(tmp_path):
    done, calls = run(tmp_path, "exit 3", "--table", "5")
    assert (done.returncode, len(calls)) == (1, 3)
    assert "tests ended with exit code 3" in done.stdout
    assert "training ended with exit code 3" in done.stdout


def test_without_rows_nothing_is_trained(tmp_path):
    _, calls = run(tmp_path, "true")
    assert len(calls) == 2


def test_too_few_minutes_are_refused(tmp_path):
    done = subprocess.run([SCRIPT, "3", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "3 minutes are too few; give at least 10" in done.stdout
