"""SIGINT and SIGTERM: asked once, remembered; asked twice, obeyed at once; handlers put back."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from train_support import environment

from pera_fast.train import signals
from pera_fast.train.signals import StopRequest, exit_on_termination


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_is_remembered(number: signal.Signals, code: int):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.exit_code == 0
        assert stop.asked() == (False, False)
        os.kill(os.getpid(), number)
        assert stop.exit_code == code
        assert stop.asked() == (number == signal.SIGINT, number == signal.SIGTERM)
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


def test_termination_during_set_up_leaves_through_finally():
    before, left = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with exit_on_termination():
            try:
                with StopRequest() as stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                    assert stop.exit_code == 143  # while training, the loop decides
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                left.append(True)

    with pytest.raises(SystemExit) as error:
        run()
    assert error.value.code == 143
    assert left == [True]
    assert signal.getsignal(signal.SIGTERM) is before
