"""Decoding processes outlive a signal to the whole job, and never their training process."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from timm_mfd.data import load_dataset
from timm_mfd.data.decoding import decoded_batches


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_batches_still_come_after_a_signal_to_every_decoding_process(folder_dataset, number):
    images = load_dataset("folder", folder_dataset).train
    batches = decoded_batches(images, 2, batch_size=2)
    for worker in batches._workers:
        os.kill(worker.pid, number)
    assert torch.equal(torch.cat(list(batches)), torch.stack([images[i] for i in range(len(images))]))


@pytest.mark.parametrize("end", ["raise SystemExit(3)", "raise ValueError", "pass"])
def test_a_process_that_ends_with_batches_under_way_does_not_wait_for_them(folder_dataset, end):
    script = (
        "import sys\n"
        "from timm_mfd.data import load_dataset\n"
        "from timm_mfd.data.decoding import decoded_batches\n"
        f"batches = decoded_batches(load_dataset('folder', {str(folder_dataset)!r}).train, 2, batch_size=2)\n"
        "next(batches)\n"
        "print(*(worker.pid for worker in batches._workers), flush=True)\n"
        f"kept = batches\n{end}\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    workers = list(map(int, result.stdout.split()))
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
