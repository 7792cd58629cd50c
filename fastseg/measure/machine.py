"""What a time depends on: the device, its driver, versions, threads, the date."""

import importlib.metadata
import platform
import shutil
import subprocess
from datetime import datetime

import torch


def machine(device: torch.device) -> dict[str, str]:
    """Facts to stand beside a measured time; of packages that are not installed there is no entry.

    Returns:
        ``chip``, ``torch``, ``python``, ``threads``, ``date``; ``triton``, ``onnxruntime`` and ``openvino`` where they
        are installed; on a GPU ``cuda``, ``cudnn`` and ``driver``.
    """
    cuda = device.type == "cuda"
    facts = {
        "chip": torch.cuda.get_device_name(device) if cuda else f"{device.type} ({platform.machine()})",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    facts |= {name: found for name in ("triton", "onnxruntime", "openvino") if (found := version(name))}
    if cuda:
        facts["cuda"] = str(torch.version.cuda or torch.version.hip)
        facts["cudnn"] = str(torch.backends.cudnn.version())
        facts["driver"] = _driver()
    return facts


def version(name: str) -> str:
    """Of a package, or "" where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    return lines[0] if lines else "unknown"
