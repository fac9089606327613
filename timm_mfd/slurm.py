"""The paper's runs as one array job of Slurm: its script, its submission, and which runs wait in the queue."""

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .training.run_folder import STOPPED

JOB_NAME = "timm_mfd"
_LEAST = 120  # seconds that a task must have between its start and its signal, else it would only start over and over
_OURS = {"job-name", "array", "requeue", "no-requeue", "signal", "open-mode", "export", "wrap", "ntasks", "time"}

# A signal reaches the step that srun starts, not this shell, which is still there afterwards to queue the task again:
# so no exec, no trap. A task that was cancelled stays cancelled.
_SCRIPT = """\
#!/bin/bash
# Each task trains one run of this list. If a signal stops it (time limit, preemption), it queues itself again, alone.
{directives}

runs_dir={runs_dir}
results_dir={results_dir}
runs=(
{runs}
)
read -r recipe seed name <<<"${{runs[SLURM_ARRAY_TASK_ID]}}"
folder=$runs_dir/$name
if [ -e "$results_dir/{protocol}/$name.json" ]; then
  echo "$name has a result"
  exit 0
fi
mkdir -p "$folder" # the mark of a stop goes there, also if the run had not begun

srun ${{SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}} \\
  {train} \\
  --recipe "$recipe" --seed "$seed" --output-dir "$folder" --resume auto
code=$?
if [ "$code" -eq 0 ]; then
  {collect} "$folder" --results-dir "$results_dir"
  code=$?
elif [ -e "$folder/{stopped}" ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


class Task(NamedTuple):
    """One run of the array.

    Attributes:
        recipe: As `RECIPE@PROTOCOL`.
        seed: The run's seed.
        name: Of its folder and, with `.json`, of its result.
    """

    recipe: str
    seed: int
    name: str


def directives(
    time: str | None, save_before: int, at_a_time: int | None, log: Path, others: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Return the options of sbatch, but for the array itself.

    Args:
        time: Time limit of a task as sbatch takes it.
        save_before: Seconds before it at which a run is asked to save its state.
        at_a_time: Tasks at a time, for the array.
        log: File of a task's output, in which `%A` and `%a` are job and task.
        others: Further options without their dashes, as they are passed through; None is one without a value.

    Raises:
        ValueError: If the time limit is none, or leaves less than two minutes, or `others` has what the script sets.
    """
    if taken := sorted(others.keys() & _OURS):
        own = "has a flag of its own here" if taken[0] == "time" else "is set by the script itself"
        raise ValueError(f"--sbatch-option {taken[0]}: it {own}; leave it out")
    if save_before < 1:
        raise ValueError(f"--save-before must be at least 1 second, not {save_before}")
    if at_a_time is not None and at_a_time < 1:
        raise ValueError(f"--array-limit must be at least 1, not {at_a_time}")
    if time is not None and seconds_of(time) < save_before + _LEAST:
        raise ValueError(
            f"--time {time} leaves a run less than two minutes before it is asked to save itself, {save_before} "
            "seconds before the end; give it more time, or a lower --save-before"
        )
    return {
        "job-name": JOB_NAME,
        "ntasks": "1",
        "requeue": None,
        "open-mode": "append",
        "export": "ALL",
        "signal": f"TERM@{save_before}",
        "output": str(log),
        **({"time": time} if time else {}),
        **others,
    }


def seconds_of(time: str) -> int:
    """Return a time limit of sbatch in seconds.

    Args:
        time: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES, or with seconds, too.

    Raises:
        ValueError: If it is none.

    Example:
        >>> seconds_of("1-12:30")
        131400
    """
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time):
        raise ValueError(f"--time {time} is no time limit of Slurm, such as 90 (minutes), 8:00:00 or 1-12 (days-hours)")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def array_script(
    tasks: Sequence[Task],
    options: Mapping[str, str | None],
    *,
    train: Sequence[str],
    collect: Sequence[str],
    protocol: str,
    runs_dir: Path,
    results_dir: Path,
    at_a_time: int | None = None,
) -> str:
    """Write the batch script of an array job.

    It holds the list of runs, so that an array that waits for days means the same ones when it starts.

    Args:
        tasks: The runs.
        options: What `directives` returns.
        train: Command that trains; recipe, seed and folder are added.
        collect: Command that writes the result of a finished run; its folder is added.
        protocol: Key of `recipes.PROTOCOLS`.
        runs_dir: Absolute folder of the run folders.
        results_dir: Absolute folder of all results.
        at_a_time: Tasks at a time; all, if the cluster has room.

    Returns:
        Text for bash and sbatch.
    """
    array = f"0-{len(tasks) - 1}" + (f"%{at_a_time}" if at_a_time else "")
    lines = [name if value is None else f"{name}={shlex.quote(value)}" for name, value in options.items()]
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH --{line}" for line in [f"array={array}", *lines]),
        runs_dir=shlex.quote(str(runs_dir)),
        results_dir=shlex.quote(str(results_dir)),
        runs="\n".join(f"  {shlex.quote(f'{task.recipe} {task.seed} {task.name}')}" for task in tasks),
        train=shlex.join(train),
        collect=shlex.join(collect),
        protocol=protocol,
        stopped=STOPPED,
    )


def folders_of(script: str) -> list[Path]:
    """Return the run folder of each task of a script that `array_script` wrote; none of another script."""
    try:
        (runs_dir,) = re.findall(r"^runs_dir=(.*)$", script, re.MULTILINE)
        (runs,) = re.findall(r"^runs=\(\n(.*?)^\)$", script, re.MULTILINE | re.DOTALL)
    except ValueError:
        return []
    return [Path(*shlex.split(runs_dir), line.split()[2]) for line in shlex.split(runs)]


def submit(script: str) -> str:
    """Hand a script to sbatch and return the number of the job.

    Raises:
        ValueError: If there is no sbatch, or it refuses.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError("there is no sbatch here; submit where Slurm is, or use reproduce.py run") from None
    if done.returncode != 0:
        raise ValueError(f"sbatch refuses the array: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def queue() -> dict[Path, str]:
    """Return the folder of each run that is in the queue of Slurm, and whether it is queued or running.

    The queue knows job and task, and Slurm has kept the script with the list. Where there is no Slurm, or it does not
    answer, nothing is queued.
    """
    states: dict[Path, str] = {}
    folders: dict[str, list[Path]] = {}
    for line in _ask("squeue", "--me", "--noheader", "--array", f"--name={JOB_NAME}", "--format=%F %K %T").splitlines():
        job, task, state = line.split()
        if job not in folders:
            folders[job] = folders_of(_ask("scontrol", "write", "batch_script", job, "-"))
        if task.isdigit() and int(task) < len(folders[job]):
            states[folders[job][int(task)]] = "queued" if state == "PENDING" else state.lower()
    return states


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
