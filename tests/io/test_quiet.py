"""What exporters print is dropped, and what other threads print is not."""

import sys
import threading

from fastseg.io.quiet import quiet


def test_one_threads_stderr_alone(capsys):
    """Blocks that overlap: the stream is back once the last has ended, whichever that is."""
    before, inside, may_end = sys.stderr, threading.Event(), threading.Event()

    def other():
        print("other, before", file=sys.stderr)
        with quiet(printed=False):
            print("other, inside", file=sys.stderr)
            inside.set()
            may_end.wait(10)
            print("other, still inside", file=sys.stderr)
        print("other, behind", file=sys.stderr)

    thread = threading.Thread(target=other)
    with quiet(printed=False):
        print("mine, inside", file=sys.stderr)
        thread.start()
        assert inside.wait(10)
    print("mine, behind", file=sys.stderr)
    may_end.set()
    thread.join()
    assert sys.stderr is before
    assert capsys.readouterr().err.splitlines() == ["other, before", "mine, behind", "other, behind"]
