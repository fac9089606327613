"""One-line errors, the processes that were asked for, the cores of the machine, and random numbers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import CONTEXT, start_process, wait_for

from timm_mfd.atomic import replacing
from timm_mfd.interruption import Stopped
from timm_mfd.launch import follow_launcher, one_line_errors, prepare_cpu, seed_step, start_all_processes


def test_user_errors_become_one_line_and_exit_code_one(capsys):
    with pytest.raises(SystemExit) as exit_, one_line_errors(ValueError):
        raise ValueError("the bad value")
    assert str(exit_.value.code).endswith(": error: the bad value")


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors(ValueError):
        _ = 1 / 0


def test_an_interruption_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_, one_line_errors(ValueError):
        raise KeyboardInterrupt
    assert exit_.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err.strip().endswith(": interrupted")


def write_half(path, said, writing):
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    with one_line_errors(), replacing(path, shared=True) as partial:
        partial.write_text("half")
        writing.set()
        time.sleep(60)


def test_sigterm_ends_in_one_line_and_leaves_no_half_written_file(tmp_path):
    writing, said, folder = CONTEXT.Event(), tmp_path / "said", tmp_path / "folder"
    folder.mkdir()
    running = start_process(write_half, folder / "pixels", said, writing)
    assert writing.wait(60)
    assert len(list(folder.iterdir())) == 1
    running.terminate()
    running.join(30)
    assert running.exitcode == 128 + signal.SIGTERM
    assert said.read_text().strip().endswith(": SIGTERM: ended")
    assert len(said.read_text().strip().splitlines()) == 1
    assert not list(folder.iterdir())


def test_after_a_block_sigterm_is_what_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with one_line_errors():
        assert before is signal.SIG_DFL or signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_launchers_single_thread_is_undone_and_a_chosen_number_is_kept(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"python\0accelerate\0launch\0train.py")  # of the parent
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


def test_an_orderly_stop_has_the_shells_exit_code_and_one_line(capsys):
    with pytest.raises(SystemExit) as exit_, one_line_errors():
        raise Stopped("kept", 15)
    assert exit_.value.code == 143
    assert capsys.readouterr().err.strip().endswith(": kept")


def test_another_process_that_died_is_one_line_and_other_runtime_errors_are_not(monkeypatch):
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError), one_line_errors():
        raise gloo
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(SystemExit, match="another process of the run ended"), one_line_errors():
        raise gloo
    with pytest.raises(RuntimeError, match="shape"), one_line_errors():
        raise RuntimeError("shape")


def test_a_kernel_that_is_not_deterministic_is_named():
    with pytest.raises(SystemExit, match="--deterministic: max_pool3d_backward has no"), one_line_errors():
        raise RuntimeError("max_pool3d_backward does not have a deterministic implementation, but you set ...")


def test_dropout_is_a_function_of_seed_epoch_step_and_process():
    def draw(*position):
        seed_step(*position)
        return torch.rand(4).tolist()

    positions = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0), (0, 11, 0, 0)]
    drawn = [draw(*position) for position in positions]
    assert len({tuple(numbers) for numbers in drawn}) == len(positions)
    assert [draw(*position) for position in positions] == drawn


FAKE_LAUNCHER = """
import os, subprocess, sys
environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
process = subprocess.Popen([sys.executable, *sys.argv[sys.argv.index("SCRIPT") + 1:]], env=environment)
sys.exit(process.wait())
"""


def test_all_processes_that_accelerate_was_asked_for_start_on_a_cpu(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "if 'RANK' not in os.environ:\n"
        "    from timm_mfd.launch import start_all_processes\n"
        "    start_all_processes()\n"
        f"open(os.path.join({str(tmp_path)!r}, os.environ.get('RANK', 'alone')), 'w').write(' '.join(sys.argv[1:]))\n"
    )
    environment = {key: value for key, value in os.environ.items() if "RANK" not in key and "WORLD" not in key}

    command = [
        sys.executable, "-c", FAKE_LAUNCHER, "accelerate", "--num-processes=2", "SCRIPT", str(script),
        "--num_processes", "3",
    ]  # fmt: skip
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    written = {path.name: path.read_text() for path in tmp_path.iterdir() if path != script}
    assert written == {"0": "--num_processes 3", "1": "--num_processes 3"}


def test_a_process_that_was_started_with_the_others_starts_none(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started again"))
    start_all_processes()


def test_a_number_of_processes_that_is_the_scripts_own_is_not_the_launchers(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["script.py", "--num_processes", "3"])
    launcher = SimpleNamespace(cmdline=lambda: ["accelerate", "launch", *sys.argv])
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"python\0accelerate\0launch\0script.py")  # of the parent
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(parent=lambda: launcher))
    with pytest.raises(ValueError, match="torchrun --nproc-per-node N script.py --num_processes 3"):
        start_all_processes()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_training_ends_when_its_launcher_is_killed_alone(tmp_path):
    child = (
        "import signal, sys, time\n"
        "from timm_mfd.launch import follow_launcher\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / 'told')!r}, 'w').close(), sys.exit()))\n"
        "follow_launcher()\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}
    process = subprocess.Popen([sys.executable, "-c", parent, "accelerate"], env=environment)
    wait_for((tmp_path / "ready").exists)
    process.kill()
    process.wait()
    wait_for((tmp_path / "told").exists)


def test_nothing_follows_a_shell(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ctypes.CDLL", None)  # would raise
    follow_launcher()
    start_all_processes()
