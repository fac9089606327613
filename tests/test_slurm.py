"""The array script means the runs that it was made of, and queues again what a signal stopped, and nothing else."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import reproduce
from test_report import results_of

from timm_mfd import results, slurm
from timm_mfd.recipes import RECIPES
from timm_mfd.results import path_of
from timm_mfd.slurm import Task
from timm_mfd.training.run_folder import STOPPED

TASKS = [Task(f"{name}@paper", seed, path_of(Path(), RECIPES[name], "paper", seed).stem)
         for name in ("resnet18/digits/softmax", "resnet50/cifar100/softmax+mfd0.1") for seed in (0, 10)]  # fmt: skip
DIGITS = {"table": "digits", "seeds": 2}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The commands of Slurm, which note how they are called; `srun` starts its command, `squeue` shows the queue."""
    programs = {
        "sbatch": 'cat >"$HERE/script"; echo "7;one"',
        "squeue": 'cat "$HERE/queue" 2>/dev/null',
        "scontrol": 'if [ "$1" = write ]; then cat "$HERE/script"; fi',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; "$@"',
        "train": 'bash "$HERE/train.sh" "$@"',
        "collect": ":",
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in programs.items():
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >>"$HERE/calls"\n{body}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script_in(folder, tasks=TASKS, **options):
    options = slurm.directives("60", 120, None, folder / "%A_%a.log", options)
    commands = {"train": ["train", "--workers", "2"], "collect": ["collect", "it"]}
    return slurm.array_script(
        tasks, options, protocol="paper", runs_dir=folder / "runs", results_dir=folder / "results", **commands
    )


def start(folder, task, train, **environment):
    """Run one task whose training does as told; return its exit code and the calls, without the noise."""
    (folder / "train.sh").write_text(train)
    (folder / "calls").unlink(missing_ok=True)
    (folder / "array.sh").write_text(script_in(folder))
    numbers = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "9", **environment}
    done = subprocess.run(["bash", "array.sh"], env=os.environ | numbers, timeout=60)
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return done.returncode, calls


def test_a_task_trains_the_run_of_its_index_as_a_step_and_keeps_its_result(cluster):
    for index, (recipe, seed, name) in enumerate(TASKS):
        words = f"train --workers 2 --recipe {recipe} --seed {seed} --output-dir {cluster}/runs/{name} --resume auto"
        result = f"collect it {cluster}/runs/{name} --results-dir {cluster}/results"
        assert start(cluster, index, "exit 0") == (0, [f"srun {words}", words, result])
    _, calls = start(cluster, 0, "exit 0", SLURM_CPUS_PER_TASK="6")
    assert calls[0].startswith("srun --cpus-per-task=6 train ")


@pytest.mark.parametrize("code", [143, 138, 1])  # of the process itself, and of a launcher
def test_a_run_that_a_signal_stopped_queues_its_own_task_again(cluster, code):
    _, calls = start(cluster, 2, f'touch "$8/{STOPPED}"; exit {code}')
    assert calls[2:] == ["scontrol requeue 7_2"]


@pytest.mark.parametrize("code", [1, 137, 143])
def test_a_run_that_failed_is_not_started_again(cluster, code):
    returned, calls = start(cluster, 2, f'mkdir -p "$8/checkpoint"; touch "$8/args.json"; exit {code}')
    assert returned == code
    assert len(calls) == 2


def test_a_run_that_is_done_by_then_ends_at_once(cluster):
    path = path_of(cluster / "results", RECIPES["resnet18/digits/softmax"], "paper", 10)
    path.parent.mkdir(parents=True)
    path.touch()
    assert start(cluster, 1, "exit 1") == (0, [])


def test_the_script_is_in_order_for_bash_and_shellcheck_and_keeps_every_path_and_option(cluster):
    folder = cluster / "a 'b'; c"
    folder.mkdir()
    text = script_in(folder, gres="gpu:a 1", exclusive=None)
    assert slurm.folders_of(text) == [folder / "runs" / task.name for task in TASKS]
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"#SBATCH --array=0-3", "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=TERM@120",
            "#SBATCH --time=60", "#SBATCH --exclusive", "#SBATCH --gres='gpu:a 1'"} < set(lines)  # fmt: skip
    for checker in (["bash", "-n", "-"], ["shellcheck", "-"]):
        if shutil.which(checker[0]):
            checked = subprocess.run(checker, input=text, capture_output=True, text=True)
            assert checked.returncode == 0, checked.stdout + checked.stderr


def test_what_is_submitted_is_in_the_list_and_is_not_submitted_again(cluster, capsys):
    reproduce.array(**DIGITS, partition="gpu", time="8:00:00", gpus_per_task="1", array_limit=2, submit=True)
    assert "job 7 with 4 runs" in capsys.readouterr().out
    text = (cluster / "script").read_text()
    for option in ("partition=gpu", "time=8:00:00", "gpus-per-task=1", "array=0-3%2"):
        assert f"#SBATCH --{option}\n" in text
    assert f"#SBATCH --output={cluster}/runs/reproduce/slurm/%A_%a.log\n" in text
    assert (cluster / "runs/reproduce/slurm").is_dir()
    (cluster / "queue").write_text("7 0 RUNNING\n7 3 PENDING\n")
    begun = cluster / "runs/reproduce/paper/resnet18-digits-softmax-seed0"
    begun.mkdir(parents=True)
    (begun / "args.json").touch()
    (begun / "metrics.jsonl").write_text("{}\n{}\n")
    reproduce.list_runs(table="digits")
    listed = capsys.readouterr().out
    assert re.search(r"digits/softmax .* seed 0 running at epoch 2 of 100\n", listed)
    assert re.search(r"digits/softmax\+mfd .* seed 1 queued\n", listed)
    reproduce.array(**DIGITS)
    shown = capsys.readouterr()
    assert "4 runs: 0 done, 2 in the queue, 2 to do" in shown.err
    assert [path.name for path in slurm.folders_of(shown.out)] == [
        "resnet18-digits-softmax+mfd-seed0", "resnet18-digits-softmax-seed1",
    ]  # fmt: skip
    (cluster / "queue").write_text("".join(f"7 {task} PENDING\n" for task in range(4)))
    reproduce.array(**DIGITS, submit=True)
    assert "4 runs: 0 done, 4 in the queue, 0 to do" in capsys.readouterr().err
    assert (cluster / "calls").read_text().count("sbatch") == 1


def test_the_command_line_prints_a_script_whose_own_command_keeps_the_result_of_a_finished_run(
    cluster, monkeypatch, capsys
):
    done = results_of("resnet18/digits/softmax", 99.0)[0]
    monkeypatch.setattr("timm_mfd.results.collect", {Path("runs/a run"): done}.get)
    monkeypatch.setattr("sys.argv", ["reproduce.py", "collect", "runs/a run", "--results-dir", "kept"])
    reproduce.main()
    assert results.read_all(Path("kept")) == [done]
    options = ["--table", "digits", "--sbatch-option", "account=abc", "exclusive", "--gpus-per-task", "a100:1"]
    monkeypatch.setattr("sys.argv", ["reproduce.py", "slurm", *options])
    reproduce.main()
    shown = capsys.readouterr().out
    for option in ("account=abc", "exclusive", "gpus-per-task=a100:1"):
        assert f"#SBATCH --{option}\n" in shown
    command = next(line for line in shown.splitlines() if " collect " in line)
    assert command.endswith('reproduce.py collect "$folder" --results-dir "$results_dir"')


def test_jobs_of_others_and_a_queue_that_does_not_answer_are_no_runs(cluster):
    (cluster / "script").write_text("#!/bin/bash\nsleep 1\n")
    (cluster / "queue").write_text("7 0 RUNNING\n8 N/A PENDING\n")
    assert slurm.queue() == {}
    (cluster / "bin" / "squeue").write_text("#!/bin/bash\necho 7 0 RUNNING\nexit 1\n")
    assert slurm.queue() == {}


def test_times_are_read_as_sbatch_reads_them():
    times = {"90": 5400, "1:30": 90, "2:00:01": 7201, "1-0": 86400, "1-2:30": 95400, "0-0:0:5": 5}
    assert {time: slurm.seconds_of(time) for time in times} == times


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "4", "save_before": 121}, "--time 4 leaves a run less than two minutes before it is asked to save"),
        ({"time": "soon"}, "--time soon is no time limit of Slurm"),
        ({"save_before": 0}, "--save-before must be at least 1 second, not 0"),
        ({"array_limit": 0}, "--array-limit must be at least 1, not 0"),
        ({"sbatch_option": ("signal=USR1@60",)}, "--sbatch-option signal: it is set by the script itself"),
        ({"sbatch_option": ("time=1",)}, "--sbatch-option time: it has a flag of its own here"),
        ({"seeds": 0}, "--seeds must be at least 1, not 0"),
        ({"rows": ("resnet18/digits", "resnet50/cifar100"), "table": None}, "the digits are a trial; submit"),
    ],
)
def test_mistakes_end_in_one_line_and_submit_nothing(cluster, options, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        reproduce.array(**{**DIGITS, "submit": True, **options})
    assert "sbatch" not in ((cluster / "calls").read_text() if (cluster / "calls").exists() else "")
    assert not (cluster / "runs").exists()


def test_two_minutes_before_the_signal_are_enough():
    assert slurm.directives("4", 120, None, Path("log"), {})["signal"] == "TERM@120"


def test_an_sbatch_that_refuses_or_is_missing_is_one_line(cluster, monkeypatch):
    (cluster / "bin" / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid\n partition' >&2\nexit 1\n")
    with pytest.raises(SystemExit, match="error: sbatch refuses the array: sbatch: error: invalid partition"):
        reproduce.array(**DIGITS, submit=True)
    monkeypatch.setenv("PATH", str(cluster))
    with pytest.raises(SystemExit, match="there is no sbatch here; .* use reproduce.py run"):
        reproduce.array(**DIGITS, submit=True)
