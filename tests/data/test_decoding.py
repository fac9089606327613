"""Decoding processes outlive a signal to the whole job, and never their training process."""

import multiprocessing
import os
import signal
import subprocess
import sys

import psutil
import torch
from processes import wait_for

from timm_mfd.data import load_dataset
from timm_mfd.data.decoding import decoded_batches
from timm_mfd.interruption import STOP_SIGNALS


def test_batches_still_come_after_any_signal_to_every_decoding_process(folder_dataset):
    images = load_dataset("folder", folder_dataset).train
    batches = decoded_batches(images, 2, batch_size=2)
    for worker in multiprocessing.active_children():
        for number in (*STOP_SIGNALS, signal.SIGINT):
            os.kill(worker.pid, number)
    assert torch.equal(torch.cat(list(batches)), torch.stack([images[i] for i in range(len(images))]))


ENDS = """
import multiprocessing, os, sys
from timm_mfd.data import load_dataset
from timm_mfd.data.decoding import decoded_batches
for end in ("raise SystemExit(3)", "raise ValueError", "pass"):
    if os.fork():
        _, status = os.wait()
        print(os.waitstatus_to_exitcode(status), flush=True)
    else:
        batches = decoded_batches(load_dataset("folder", sys.argv[1]).train, 2, batch_size=2)
        next(batches)
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
        exec(end)
        break
"""


def test_a_process_that_ends_with_batches_under_way_does_not_wait_for_them(folder_dataset):
    """A real interpreter, as its end is the claim; it imports once and then forks."""
    command = [sys.executable, "-c", ENDS, str(folder_dataset)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    pairs = [list(map(int, line.split())) for line in result.stdout.splitlines()]
    assert pairs[1::2] == [[3], [1], [0]], result.stderr
    workers = [pid for pair in pairs[::2] for pid in pair]
    assert len(workers) == 6
    assert "killed" not in result.stderr
    wait_for(lambda: not any(map(is_running, workers)), seconds=20)


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
