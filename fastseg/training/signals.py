"""SIGTERM, by which a cluster reclaims its machine, and Ctrl-C: a flag, and readers that outlive both."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Return a function that gives the SIGTERM or SIGINT received since the block began, or 0.

    Inside the block no SIGTERM ends the process, however many come: a launcher and its scheduler may each send one. A
    second Ctrl-C raises KeyboardInterrupt, as one does outside the block. Only the main thread gets signals; in others
    the value is 0.
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
    """Make a DataLoader's worker ignore Ctrl-C, and every SIGTERM that its reading process did not send.

    Launchers send one to the whole process group, as terminals do. A worker that dies would end the step before there
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
