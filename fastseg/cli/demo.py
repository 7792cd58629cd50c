"""Train a small model on texture mosaics of real photographs, score it, and time it against eager PyTorch."""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastseg.cli.common import add_device, describe, positive_int, say, seed
from fastseg.demo.mosaic import CLASSES, halves, load_photographs, mosaics
from fastseg.inference.segment import segment
from fastseg.io.checkpoint import save_checkpoint
from fastseg.io.files import make_folder
from fastseg.io.images import class_map, figure, to_tensor, write_png
from fastseg.io.progress import progress
from fastseg.measure import comparison
from fastseg.metrics import ConfusionMatrix, Scores
from fastseg.models import create, names

# A quarter of the width learns the four textures in 400 steps, 55 s of one core (FCN: 25 s); the full width takes
# minutes for 100.
OPTIONS = {
    "deconvnet": {"width": 0.125, "bottleneck": 5},
    "deeplabv2": {"backbone": "resnet50", "output_stride": 16, "width": 0.125, "scales": ()},
    "deeplabv3": {"backbone": "resnet18", "output_stride": 16, "width": 0.25, "channels": 32},
    "deeplabv3plus": {"width": 0.25, "decoder_channels": 32},
    "fcn": {"backbone": "resnet18", "stride": 4, "width": 0.25},
    "segnet": {"width": 0.125},
    "segnet_basic": {"channels": 16},
    "unet": {"padding": "same", "norm": True, "widths": (8, 16, 32, 64)},
    "unetplusplus": {"norm": True, "up": "bilinear", "widths": (8, 16, 32), "deep_supervision": True},
}
# The full-size model that is timed, where the default cannot take any image: U-Net's would leave out a margin.
FULL_SIZE = {"unet": {"padding": "same", "norm": True}, "unetplusplus": {"norm": True, "up": "bilinear"}}
FILES = ("mosaics.png", "mosaic.png", "weights.pt")
STEPS, BATCH, SIDE = 400, 6, 160
LEARNING_RATE = 0.02
TEST_MOSAICS = 32
# After the default number of steps; over 0.9 is usual for the first two. SegNet's deep, narrow encoder learns slowest:
# 0.63, and 0.74 after 1000 steps; its authors start from a VGG16 trained on ImageNet. Nothing is expected of DeconvNet,
# DeepLabV2 and V3, which have not been run to the end yet.
EXPECTED_MIOU = {
    "deeplabv3plus": 0.85,
    "fcn": 0.85,
    "segnet_basic": 0.8,
    "segnet": 0.55,
    "unet": 0.8,
    "unetplusplus": 0.8,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", choices=names(), default="deeplabv3plus", help="default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="of mosaics, weights and training (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), metavar="DIR", help="default: %(default)s")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Train, score, draw and time; return 0, or raise ``ValueError`` if the training diverged or scores poorly."""
    start = time.perf_counter()
    make_folder(args.output, FILES)
    photographs = load_photographs()
    train_textures, test_textures = halves(photographs)
    print(f"{args.model} on {describe(args.device)}; CC0 photographs from scikit-image: {', '.join(CLASSES)}")

    torch.manual_seed(args.seed)
    options = OPTIONS.get(args.model, {})
    model = create(args.model, len(CLASSES), **options)
    model = model.to(args.device, memory_format=torch.channels_last)
    train(model, train_textures, args.steps, args.seed)

    pictures, labels = mosaics(test_textures, TEST_MOSAICS, SIDE, np.random.default_rng([args.seed, 1]))
    predicted = np.concatenate([segment(model, chunk) for chunk in np.split(pictures, TEST_MOSAICS // 8)])
    scores = score(predicted, labels)
    print(f"\n{TEST_MOSAICS} mosaics of the photographs' right halves, of which training saw the left halves:")
    print(score_table(scores))

    rows = [
        (Image.fromarray(picture), class_map(truth, len(CLASSES)), class_map(guess, len(CLASSES)))
        for picture, truth, guess in zip(pictures[:4], labels[:4], predicted[:4], strict=True)
    ]
    write_png(args.output / "mosaics.png", figure(rows, ("photograph", "truth", "prediction"), CLASSES))
    write_png(args.output / "mosaic.png", rows[0][0])
    save_checkpoint(args.output / "weights.pt", model, args.model, options, CLASSES)
    say(f"\nlook at {args.output / 'mosaics.png'}; to segment a picture with these weights:")
    say(f"  fastseg predict {args.output / 'mosaic.png'} --weights {args.output / 'weights.pt'} -o {args.output}\n")
    print(latency(args.model, model, args.device))
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    expected = EXPECTED_MIOU.get(args.model, 0.0)
    if args.steps >= STEPS and scores.mean_iou < expected:
        raise ValueError(f"mIoU {scores.mean_iou:.3f} is below {expected}: the training did not converge")
    return 0


def train(model: nn.Module, textures: dict[str, np.ndarray], steps: int, seed: int) -> None:
    """Train in place on mosaics made on the fly; the model is in eval mode afterwards.

    Raises:
        ValueError: the loss is not finite.
    """
    rng = np.random.default_rng([seed, 0])
    device = next(model.parameters()).device
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # no mosaic comes twice: in so short a training dropout only costs
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    bar = progress(range(steps), "train", unit="step")
    for step in bar:
        pictures, labels = mosaics(textures, BATCH, SIDE, rng)
        loss: Tensor = model.loss(to_tensor(pictures).to(device), torch.from_numpy(labels).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:  # reading the loss waits for the device
            value = loss.item()
            if not np.isfinite(value):
                raise ValueError(f"training diverged: the loss is {value} at step {step}; try another --seed")
            bar.set_postfix_str(f"loss {value:.3f}")
    model.eval()


def score(predicted: np.ndarray, labels: np.ndarray) -> Scores:
    """Scores of class maps against the true ones."""
    confusion = ConfusionMatrix(len(CLASSES))
    confusion.update(torch.from_numpy(predicted), torch.from_numpy(labels))
    return confusion.compute()


def score_table(scores: Scores) -> str:
    """One line per class, then the means."""
    lines = [f"{'':<8}{'IoU':>10}{'precision':>12}{'recall':>10}"]
    columns = (scores.iou.tolist(), scores.precision.tolist(), scores.recall.tolist())
    for name, iou, precision, recall in zip(CLASSES, *columns, strict=True):
        lines.append(f"{name:<8}{iou:>10.3f}{precision:>12.3f}{recall:>10.3f}")
    lines.append(f"{'mean':<8}{scores.mean_iou:>10.3f}{scores.mean_precision:>12.3f}{scores.mean_recall:>10.3f}")
    lines.append(f"mIoU {scores.mean_iou:.4f}  mPA {scores.mean_pixel_accuracy:.4f}")
    return "\n".join(lines)


def latency(name: str, model: nn.Module, device: torch.device) -> str:
    """Each op and the model, the trained one and the full-size one: fastseg against eager PyTorch, batch 1."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    full = create(name, 21, **FULL_SIZE.get(name, {}))
    cases = comparison.op_cases(device, dtype)
    cases.append(comparison.model_case(f"{name}, as trained", model, 512, device, dtype))
    cases.append(comparison.model_case(f"{name}, full size", full, 256, device, dtype))
    results = [comparison.compare(case) for case in progress(cases, "time", unit="case")]
    notes = [f"Latency on {describe(device)}, {str(dtype).removeprefix('torch.')}, batch 1, eval, channels_last:"]
    if device.type == "cpu":
        notes.append("(on a CPU fastseg runs its reference path, PyTorch with batch norm folded: no kernel is timed)")
    return "\n".join([*notes, comparison.table(results)])
