"""The script for a GPU without a network calls reproduce.py with what that understands, within its time."""

import functools
import subprocess
from pathlib import Path

import pytest
import reproduce
import tyro

from timm_mfd import recipes

SCRIPT = Path(reproduce.__file__).with_name("tiny_imagenet.sh")
# In place of python: says that there is a GPU, writes the words of other calls, and ends as it is told.
PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit "${NO_GPU:-0}"
printf '%s\\n' "$*" >> "$CALLS"
exit "${ENDS:-0}"
"""


@pytest.fixture
def call(tmp_path):
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "my data").mkdir()
    calls = tmp_path / "calls"

    def run(*words, **environment):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(calls), **environment}
        done = subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True, cwd=tmp_path)
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def understood(line):
    """The arguments that reproduce.py takes from a command line."""
    taken = {}

    def recorded(function):
        @functools.wraps(function)
        def record(**arguments):
            taken.update(arguments)

        return record

    commands = {"run": recorded(reproduce.run), "report": recorded(reproduce.report)}
    words = line.replace("my data", "my_data").split()
    assert words[0] == "train_scripts/reproduce.py"
    tyro.extras.subcommand_cli_from_dict(commands, args=words[1:])
    return taken


def test_all_rows_of_tiny_imagenet_are_trained_in_order_with_three_seeds(call, tmp_path):
    done, lines = call("my data", "100", "6")
    assert done.returncode == 0, done.stderr
    *runs, report = lines
    assert report == "train_scripts/reproduce.py report"
    assert all(f"--data-dir {tmp_path / 'my data'} " in line for line in runs)
    arguments = [understood(line) for line in runs]
    for taken in arguments:
        assert (taken["mixed_precision"], taken["compile"], taken["parallel"], taken["seeds"]) == ("bf16", True, 6, 3)
        assert 97 <= taken["time_limit"] <= 100
    chosen = [recipe for taken in arguments for recipe in recipes.select(taken["table"], taken["rows"])]
    wanted = [recipe for recipe in recipes.RECIPES.values() if recipe.dataset == "tiny_imagenet"]
    assert {recipe.id for recipe in chosen} == {recipe.id for recipe in wanted}
    assert [recipe.backbone for recipe in chosen[:4]] == ["mobilenetv2"] * 2 + ["resnet50"] * 2


@pytest.mark.parametrize("code", ["130", "142", "143"])
def test_what_stops_a_run_ends_the_script_with_its_code(call, code):
    done, lines = call("my data", "100", ENDS=code)
    assert done.returncode == int(code)
    assert len(lines) == 1


def test_a_run_that_fails_keeps_no_other_from_running_and_is_not_forgotten(call, tmp_path):
    python = tmp_path / "python"
    python.write_text(python.read_text().replace('exit "${ENDS', 'case "$*" in *report) exit;; esac\nexit "${ENDS'))
    done, lines = call("my data", "100", ENDS="1")
    assert done.returncode == 1
    assert [line.split()[1] for line in lines] == ["run", "run", "run", "report"]


def test_nothing_begins_that_could_not_be_saved(call):
    done, lines = call("my data", "2")
    assert (done.returncode, lines) == (142, [])
    assert "stopped at the time limit; the same command goes on" in done.stdout


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ((), {}, "usage: "),
        (("nowhere", "100"), {}, "'nowhere' does not exist; DATA is the folder that holds tiny-imagenet-200/"),
        (("my data", "soon"), {}, "MINUTES must be a whole number above 0, not 'soon'"),
        (("my data", "100", "0"), {}, "RUNS_AT_A_TIME must be a whole number above 0, not '0'"),
        (("my data", "100"), {"NO_GPU": "1"}, "there is no GPU that torch can use"),
    ],
)
def test_mistakes_end_in_one_line(call, words, environment, message):
    done, lines = call(*words, **environment)
    assert (done.returncode, lines) == (2, [])
    assert done.stderr.startswith(f"tiny_imagenet.sh: error: {message}")
    assert done.stderr.count("\n") == 1
