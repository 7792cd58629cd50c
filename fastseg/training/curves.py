"""Learning curves as CSV, JSON, and a plot if matplotlib is installed."""

import csv
import io
import json
from pathlib import Path

from fastseg.io.files import atomic_write


def write_curves(folder: Path, history: list[dict]) -> None:
    """Write ``curves.csv``, ``curves.json`` and ``curves.png``, each atomically."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    with atomic_write(folder / "curves.csv") as file:
        file.write(table.getvalue().encode())
    with atomic_write(folder / "curves.json") as file:
        file.write(json.dumps(history, indent=1).encode())
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["loss"] for row in history], ".-", color="#c8553d")
    left.set(xlabel="epoch", ylabel="training loss")
    for name, label, colour in (("mean_iou", "mIoU", "#c8553d"), ("pixel_accuracy", "pixel accuracy", "#5b8db8")):
        right.plot(epochs, [row[name] for row in history], ".-", label=label, color=colour)
    right.set(xlabel="epoch", ylabel="val", ylim=(0, 1))
    right.legend()
    with atomic_write(folder / "curves.png") as file:
        figure.savefig(file, format="png", dpi=100)
