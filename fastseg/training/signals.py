"""SIGTERM, with which a cluster takes its machine back: a flag to look at, and readers that outlive it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Whether a SIGTERM has come since the block began; within it none ends the process, however many come.

    A launcher and its scheduler may each send one. Outside the main thread, which alone gets signals, it is False.
    """
    came = False

    def heard(number: int, frame: object) -> None:
        nonlocal came
        came = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, heard)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)


def obey_parent_alone(worker: int) -> None:
    """What a DataLoader's worker does first: SIGTERM ends it only if the process that reads from it is the sender.

    Launchers send one to the whole process group; a worker that dies takes the step down before there is a checkpoint.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
