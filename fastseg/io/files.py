"""Files from anyone: only regular files are opened, writes are atomic, text is safe for a terminal."""

import errno
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

MAX_JSON = 2**28  # bytes; a long latency study has some 10^6
NAME = 255  # bytes of a file's name, on every file system in use
_UNFIT = (
    re.compile(  # control characters, line separators, marks that turn the direction of text, halves of a character
        "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    )
)


def printable(text: object) -> str:
    """``text`` on one line, safe for a terminal: characters that would steer it become escapes such as ``\\x1b``."""
    return _UNFIT.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if there is none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def open_regular(path: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; a pipe or a device, which may block forever, is refused.

    Raises:
        ValueError: the file does not exist, is not regular, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:  # ENXIO: a socket
        reason = "not a regular file" if error.errno == errno.ENXIO else f"cannot be opened: {error.strerror}"
        raise ValueError(f"{path}: {reason}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ValueError(f"{path}: {'a folder, not a file' if stat.S_ISDIR(mode) else 'not a regular file'}")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_json(path: str | Path) -> object:
    """Read a JSON file in UTF-8.

    Raises:
        ValueError: it cannot be opened, is larger than ``MAX_JSON``, is not JSON, is nested too deeply, or has a name
            twice in one object.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON:
            raise ValueError(f"{path}: {size} bytes, more than the limit of {MAX_JSON} for JSON")
        try:
            return json.loads(file.read().decode("utf-8-sig"), object_pairs_hook=_once)
        except RecursionError:
            raise ValueError(f"{path}: cannot be read as JSON: nested too deeply") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as JSON: {first_line(error)}") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` at the end of the block; on an error ``path`` is unchanged.

    The temporary file is new: a link or file planted under its name is neither followed nor overwritten.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    token = f".{secrets.token_hex(8)}.tmp"
    known = os.fsdecode(os.fsencode(path.name)[: NAME - len(token) - 1])
    temporary = path.with_name(f".{known}{token}")  # the same folder: a rename does not cross file systems
    file = open(temporary, "xb")  # noqa: SIM115
    try:
        with file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def look_at_folder(folder: str | Path, names: Sequence[str] = ()) -> None:
    """Check that ``folder`` can be made or written to, before the work whose results go there; creates nothing.

    Args:
        folder: of the results.
        names: of the files that will be written; none of them may be a folder.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder = Path(folder)
    try:
        there = folder
        while not os.path.lexists(there) and there != there.parent:
            there = there.parent
        os.stat(there)  # a link in a circle, or to nowhere
        if not there.is_dir():
            code = errno.EEXIST if there == folder else errno.ENOTDIR
            raise OSError(code, os.strerror(code))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        longest = max((len(os.fsencode(part)) for part in folder.parts), default=0)
        if longest > NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:
        message = f"{folder}: cannot be made or written to ({error.strerror}); choose another folder with -o"
        raise OSError(message) from error
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name}: is a folder, and a file of this name will be written")


def make_folder(folder: str | Path, names: Sequence[str] = ()) -> None:
    """Make ``folder`` with its parents, after ``look_at_folder``.

    Raises:
        OSError: it cannot be made or written to.
    """
    look_at_folder(folder, names)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # on a read-only disk all may be permitted, and nothing possible
            pass
    except OSError as error:
        message = f"{folder}: cannot be made or written to ({error.strerror}); choose another folder with -o"
        raise OSError(message) from error
