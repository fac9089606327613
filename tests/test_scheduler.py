"""Runs side by side: all of them, so many at a time, and none left behind."""

import os
import signal
import sys
from pathlib import Path

import pytest
from processes import start_process, wait_for

from timm_mfd.interruption import StopSignals
from timm_mfd.launch import cpu_cores
from timm_mfd.scheduler import Job, run_jobs


def job(folder, name, code):
    return Job(name, (sys.executable, "-c", code), folder / f"{name}.log")


def test_all_jobs_run_and_no_more_at_a_time_than_asked(tmp_path):
    jobs = [job(tmp_path, str(number), f"raise SystemExit({number})") for number in range(5)]
    running, at_once, codes = set(), [], {}

    def started(job):
        running.add(job)
        at_once.append(len(running))

    for ended in run_jobs(jobs, 2, StopSignals(), started=started):
        running.remove(ended.job)
        codes[ended.job.name] = ended.code
    assert codes == {str(number): number for number in range(5)}
    assert max(at_once) == 2


def test_jobs_share_the_cores_and_take_the_gpus_in_turn(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [job(tmp_path, str(number), code) for number in range(3)]
    list(run_jobs(jobs, 3, StopSignals()))
    assert sorted(job.log.read_text().split()[1] for job in jobs) == ["5", "5", "7"]
    assert {job.log.read_text().split()[0] for job in jobs} == {str(max(1, cpu_cores() // 3))}
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    list(run_jobs(jobs[:1], 1, StopSignals()))
    assert jobs[0].log.read_text().split()[2] == "9"  # appended, and the user's own choice


SLOW_TO_END = """
import signal, sys, time
def end(*_):
    print("saving", flush=True)
    time.sleep(0.5)
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


def test_after_a_signal_jobs_end_in_order_and_none_is_started(tmp_path):
    jobs = [job(tmp_path, str(number), SLOW_TO_END) for number in range(4)]
    stop = StopSignals()

    def watch():
        if all(job.log.exists() and "ready" in job.log.read_text() for job in jobs[:2]):
            stop.received = signal.SIGTERM

    ended = [(job.name, code, words) for job, code, words in run_jobs(jobs, 2, stop, watch)]
    assert sorted(ended) == [("0", 143, "saving"), ("1", 143, "saving")]
    assert not jobs[2].log.exists()


def _schedule(folder):
    list(run_jobs([job(Path(folder), "child", SLOW_TO_END)], 1, StopSignals()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do that")
def test_jobs_end_when_the_scheduler_is_killed(tmp_path):
    process = start_process(_schedule, str(tmp_path))
    log = tmp_path / "child.log"
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_for(lambda: "saving" in log.read_text())


def test_an_error_in_between_leaves_no_process(tmp_path):
    def fail():
        if (tmp_path / "child.log").exists() and "ready" in (tmp_path / "child.log").read_text():
            raise RuntimeError("elsewhere")

    with pytest.raises(RuntimeError, match="elsewhere"):
        list(run_jobs([job(tmp_path, "child", SLOW_TO_END + "# of this test")], 1, StopSignals(), fail))
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"# of this test" in command for command in commands)


def test_why_a_job_failed_is_told_by_its_error_or_its_signal_and_by_this_attempt_alone(tmp_path):
    words = job(tmp_path, "a", "print('x.py: error: no such data'); print('epoch 3'); raise SystemExit(1)")
    quiet = job(tmp_path, "a", "raise SystemExit(2)")
    killed = job(tmp_path, "b", "import os, signal; print('epoch 4', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    blocked = job(tmp_path, "c", "")
    blocked.log.mkdir()
    ended = {(e.job.name, e.code): e.words for e in run_jobs([words, quiet, killed, blocked], 1, StopSignals())}
    assert ended["a", 1] == "x.py: error: no such data"
    assert ended["a", 2] == "no output"
    assert ended["b", -9] == "killed by SIGKILL after: epoch 4"
    assert "Is a directory" in ended["c", 1]
