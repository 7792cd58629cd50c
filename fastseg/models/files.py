"""Read files of weights, safetensors or ``torch.save``, without trusting them."""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor


def read_payload(path: Path) -> object:
    """Return what the file holds, with tensors on the CPU; code in a pickle is refused, never executed.

    Raises:
        ValueError: the file is damaged, holds Python objects, or has another format.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{":  # eight bytes of length, then JSON
            return _read_safetensors(path)
        zipped = head.startswith(b"PK")
        if zipped:
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about how the file was written; the user gets one line
            # Mapped, a tensor cannot claim more bytes than the file has.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"load_weights: {path} is damaged, or holds Python objects besides tensors (refused, not executed); "
            "save model.state_dict() alone"
        ) from error
    except Exception as error:  # on a damaged file the readers raise anything from KeyError to RuntimeError
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"load_weights: cannot read {path} as safetensors or PyTorch weights: {reason}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("it is a safetensors file; install the package safetensors") from error
    return load_file(path)


def _check_archive(path: Path) -> None:
    """Check what torch.load ignores: it reads compressed records as if uncompressed, and skips checksums."""
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("it is a compressed archive, which torch.save never writes")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong; the file is damaged")
