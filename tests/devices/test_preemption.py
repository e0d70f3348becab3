"""Requests to stop, by real signals to this process, and the handlers that come back afterwards."""

import os
import signal

import pytest

from cfd.devices import preemption


def handlers() -> list:
    return [signal.getsignal(number) for number in preemption.SIGNALS]


@pytest.mark.parametrize("number", preemption.SIGNALS, ids=lambda number: number.name)
def test_every_signal_asks_to_stop_once(number: signal.Signals) -> None:
    before = handlers()
    with preemption.stopping_on_request():
        assert not preemption.requested()
        os.kill(os.getpid(), number)
        assert preemption.requested()
    assert handlers() == before and not preemption.requested()


def test_a_second_interrupt_ends_the_block_at_once() -> None:
    before = handlers()
    with pytest.raises(KeyboardInterrupt), preemption.stopping_on_request():
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested()
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    assert handlers() == before and not preemption.requested()


def test_a_closed_terminal_stays_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemption.stopping_on_request():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not preemption.requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
