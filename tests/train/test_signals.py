"""Stopping signals: asked once, remembered; asked twice, obeyed at once; handlers put back."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from train_support import environment

from pera_fast.train import signals
from pera_fast.train.signals import StopRequest, exit_code, exit_on_termination

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_first_signal_is_remembered(number: signal.Signals, code: int):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.exit_code == 0
        assert exit_code(stop.asked()) == 0
        os.kill(os.getpid(), number)
        assert stop.exit_code == code
        assert exit_code(stop.asked()) == code
        os.kill(os.getpid(), number)  # the same request, delivered twice
    assert signal.getsignal(number) is before


def test_second_interrupt_stops_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", -1.0)
    before = signal.getsignal(signal.SIGINT)

    def run() -> None:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert signal.getsignal(signal.SIGINT) is before


def test_second_termination_stops_at_once():
    code = textwrap.dedent("""
        import os, signal
        from pera_fast.train import signals
        signals.SAME_REQUEST_SECONDS = -1.0
        with signals.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            print(stop.exit_code, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here", flush=True)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "143\n"), done.stderr


def test_outside_of_the_main_thread_nothing_is_touched():
    before, seen = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.exit_code))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]


@pytest.mark.parametrize(("number", "code"), [pair for pair in CODES if pair[0] != signal.SIGINT])
def test_termination_during_set_up_leaves_through_finally(number: signal.Signals, code: int):
    before, left = signal.getsignal(number), []

    def run() -> None:
        with exit_on_termination():
            try:
                with StopRequest() as stop:
                    os.kill(os.getpid(), number)
                    assert stop.exit_code == code  # while training, the loop decides
                os.kill(os.getpid(), number)
            finally:
                left.append(True)

    with pytest.raises(SystemExit) as error:
        run()
    assert error.value.code == code
    assert left == [True]
    assert signal.getsignal(number) is before


def test_ignored_hangup_stays_ignored():
    """What nohup asks for, in set-up and in training."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exit_on_termination(), StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.exit_code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ranks_with_different_signals_agree_on_one():
    assert exit_code([True, True, False, True]) == 143
    assert exit_code([True, True, False, False]) == 138
