"""SIGTERM, with which a cluster takes its machine back, and Ctrl-C: a flag, and readers that outlive both."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """The number of the SIGTERM or SIGINT that has come since the block began, or 0.

    Within the block no SIGTERM ends the process, however many come: a launcher and its scheduler may each send one. A
    second Ctrl-C raises KeyboardInterrupt, as one does outside the block. Outside the main thread, which alone gets
    signals, it is 0.
    """
    came = 0

    def heard(number: int, frame: object) -> None:
        nonlocal came
        if number == signal.SIGINT and came == signal.SIGINT:
            raise KeyboardInterrupt
        came = came or number

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def obey_parent_alone(worker: int) -> None:
    """What a DataLoader's worker does first: SIGTERM ends it only if the process that reads from it is the sender, and
    Ctrl-C does not.

    Launchers send one to the whole process group, as terminals do; a worker that dies takes the step down before there
    is a checkpoint.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
