"""Signals that end a run after its step, and the end of its hours.

    with signals_noted():
        while not signal_to_stop():
            ...
"""

import contextlib
import os
import signal
import socket
import threading
import time

import distributed
from files import print0

STOP_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1') if hasattr(signal, name)]
TIME_OVER = 1000  # in place of a signal's number
received = []  # numbers of the stop signals so far, or TIME_OVER


@contextlib.contextmanager
def signals_noted():
    """Note stop signals for signal_to_stop(). A second SIGINT ends the process at once."""
    received.clear()
    read_end, write_end = socket.socketpair()
    write_end.setblocking(False)
    threading.Thread(target=watch_signals, args=[read_end], daemon=True).start()
    old_descriptor = signal.set_wakeup_fd(write_end.fileno())
    old_handlers = {number: signal.signal(number, lambda number, frame: received.append(number))
                    for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_descriptor)
        write_end.close()  # ends the thread


def watch_signals(read_end):
    """Acknowledge the first stop signal, and end the process at the second SIGINT.

    In a thread, because Python calls no handler while the main thread computes or waits in C++.
    """
    # torchrun forwards a Ctrl-C that the terminal has already sent to the ranks
    echo_s = 3.0 if 'TORCHELASTIC_RUN_ID' in os.environ else 0.0
    acknowledged, sigint_s = False, None
    while number := read_end.recv(1):
        if number[0] not in STOP_SIGNALS:
            continue
        if not acknowledged:
            print0(f'{signal.Signals(number[0]).name}: stopping after this step or batch')
            acknowledged = True
        if number[0] == signal.SIGINT:
            now_s = time.monotonic()
            if sigint_s is not None and now_s - sigint_s > echo_s:
                os._exit(130)  # skip the cleanup, which could wait
            sigint_s = sigint_s or now_s


def signal_to_stop() -> str | None:
    """Return the name of a stop signal that a rank has received, or max_hours; None to continue."""
    number = distributed.largest(received[0] if received else 0)
    if number == TIME_OVER:
        return 'max_hours'
    return signal.Signals(number).name if number else None
