"""Signals are noted and acted on between two steps, by all processes at the same one."""

import os
import signal
import time

import pytest
from processes import run_processes

from timm_mfd import interruption
from timm_mfd.interruption import Agreement, Stopped, StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_noted_and_the_old_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert signal.getsignal(number) == before


def test_the_copy_of_a_signal_that_a_launcher_passes_on_is_no_second_one():
    with StopSignals() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.received == signal.SIGINT


def test_a_second_ctrl_c_ends_the_process_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "_PATIENCE", 0.01)
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_what_is_watched_stops_at_the_next_item():
    seen = []
    with pytest.raises(Stopped, match="SIGTERM: half done") as stopped, StopSignals() as stop:
        for item in stop.watch(range(5), "half done"):
            seen.append(item)
            if item == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [0, 1]
    assert stopped.value.exit_code == 143


def test_one_process_agrees_with_itself():
    assert Agreement()([3, 0]) == [3, 0]


def agree(rank, processes):
    agreement = Agreement()
    return [agreement([rank * 10, 5 - rank]), agreement([0, 0])]


def test_processes_agree_on_the_largest_numbers(tmp_path):
    assert run_processes(agree, 3, tmp_path) == [[[20, 5], [0, 0]]] * 3


def test_what_was_asked_for_is_the_first_signal_and_a_ctrl_c_soon_after_it_is_not_the_second():
    with StopSignals() as stop:
        stop.ask(signal.SIGALRM)
        stop.ask(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGALRM
