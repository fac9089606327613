"""An array on a real Slurm, which is set up here: preempted, cut off, cancelled, and every weight as if nothing was."""

import getpass
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import reproduce
from processes import wait_for

from timm_mfd import results

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"Slurm is not installed, {MISSING} are missing; in Debian: slurmctld slurmd slurm-client"
    ),
]

# One node of four CPUs, whatever the machine has; jobs in `high` preempt those in `low`, which get a time to save.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
KillWait=30
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 PreemptMode=REQUEUE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""

# The paper's 100 epochs of digits with a tiny network. With PACE they take as long as a cluster needs to interfere.
COMMON = f"""
import os, sys, time
sys.path.insert(0, {str(Path(reproduce.__file__).parent)!r})
from timm_mfd import recipes
recipes.MODELS = {{**recipes.MODELS, "resnet18": "test_resnet"}}
recipes.paper_stem = lambda *_: "auto"
"""
TRAIN = f"""{COMMON}
import train
from timm_mfd.launch import one_line_errors
evaluate = train.evaluate
train.evaluate = lambda *arguments: (time.sleep(float(os.environ.get("PACE", 0))), evaluate(*arguments))[1]
with one_line_errors():
    train.main(train.parse())
"""
REPRODUCE = f"""{COMMON}
import reproduce
from pathlib import Path
reproduce.__file__ = __file__
reproduce.TRAIN = Path(__file__).with_name("train.py")
reproduce.main()
"""
DIGITS = ("--table", "digits", "--protocol", "paper", "--seeds", "2")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of this test's own."""
    folder = tmp_path / "slurm"
    (folder / "spool").mkdir(parents=True)
    (folder / "state").mkdir()
    with ExitStack() as free:
        sockets = [free.enter_context(socket.socket()) for _ in range(2)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, user=getpass.getuser(), folder=folder, ports=ports))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    daemons = [subprocess.Popen([name, "-D"], stderr=subprocess.DEVNULL) for name in ("slurmctld", "slurmd")]
    try:
        wait_for(lambda: call("sinfo", "-h", "--partition=low", "--format=%t", check=False).strip() == "idle", 60)
        yield
    finally:
        call("scancel", f"--user={getpass.getuser()}", check=False)
        time.sleep(2)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def until(condition):
    """Slurm lets a task that was queued again wait for two minutes, and the machine may be busy."""
    wait_for(condition, seconds=1500)


def call(*command, check=True):
    return subprocess.run(command, check=check, capture_output=True, text=True).stdout


def state_of(task):
    """The state of a task of an array, and how often it was started again."""
    shown = call("scontrol", "show", "job", task)
    return re.search(r"JobState=(\w+)", shown)[1], int(re.search(r"Restarts=(\d+)", shown)[1])


def test_an_array_that_is_preempted_cut_off_and_cancelled_ends_with_the_bits_of_one_that_was_not(
    slurm, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(reproduce.slurm.__file__).parents[1]))
    Path("train.py").write_text(TRAIN)
    Path("reproduce.py").write_text(REPRODUCE)

    def run(*words):
        return call(sys.executable, "reproduce.py", *words)

    run("run", *DIGITS, "--runs-dir", "undisturbed", "--parallel", "2")
    monkeypatch.setenv("PACE", "2.5")
    submit = ("slurm", *DIGITS, "--runs-dir", "runs", "--time", "30", "--save-before", "60", "--submit")
    job = re.search(r"job (\d+) with 4 runs", run(*submit))[1]
    script = call("scontrol", "write", "batch_script", job, "-")
    names = [folder.name for folder in reproduce.slurm.folders_of(script)]

    def epochs(task):
        metrics = Path("runs/paper", names[task], "metrics.jsonl")
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    until(lambda: all(epochs(task) >= 2 for task in range(4)))
    call("sbatch", "--partition=high", "--output=/dev/null", "--wrap", "sleep 3")
    until(lambda: any(state_of(f"{job}_{task}")[0] == "PENDING" for task in range(4)))
    (preempted,) = [task for task in range(4) if state_of(f"{job}_{task}")[0] == "PENDING"]
    limited, cancelled, alone = [task for task in range(4) if task != preempted]
    call("scontrol", "update", f"JobId={job}_{limited}", "TimeLimit=2")
    call("scancel", f"{job}_{cancelled}")
    until(lambda: state_of(f"{job}_{cancelled}")[0] == "CANCELLED")
    until(lambda: state_of(f"{job}_{limited}")[0] == "PENDING")
    call("scontrol", "update", f"JobId={job}_{limited}", "TimeLimit=30")
    assert state_of(f"{job}_{alone}") == ("RUNNING", 0)
    assert state_of(f"{job}_{cancelled}")[0] == "CANCELLED"

    listed = run("list", *DIGITS[:4], "--runs-dir", "runs")
    for task, words in ((preempted, "queued at"), (limited, "queued at"), (cancelled, "at"), (alone, "running at")):
        seed = names[task][-1]
        row = next(line for line in listed.splitlines() if f" {names[task][:-6].replace('-', '/')} " in line)
        assert re.search(rf"seed {seed} {words} epoch \d+ of 100", row), listed
    again = re.search(r"job (\d+) with 1 runs", run(*submit))[1]

    folders = [Path("runs/paper", name) for name in names]
    until(lambda: len(list(Path("runs/results/paper").glob("*.json"))) == 4)
    for folder in folders:
        model = Path("model", "model.safetensors")
        assert (folder / model).read_bytes() == (Path("undisturbed/paper") / folder.name / model).read_bytes()
    assert [state_of(f"{job}_{task}")[1] for task in (preempted, limited, alone)] == [1, 1, 0]
    said = {task: Path("runs/slurm", f"{job}_{task}.log").read_text() for task in range(4)}
    for task in (preempted, limited):
        assert "SIGTERM: stopped" in said[task]
        assert said[task].count("resuming ") == 1
    assert "resuming " not in said[alone]
    assert "resuming " in Path("runs/slurm", f"{again}_0.log").read_text()
    assert len(results.read_all(Path("runs/results"))) == 4
    assert "4 runs; the report is" in run("report", "--results-dir", "runs/results")
