"""The training loop: torch's optimisers, schedules, AMP and DistributedDataParallel around ``model.loss``."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR, PolynomialLR

from fastseg.io.files import first_line
from fastseg.io.processes import Processes
from fastseg.io.progress import progress
from fastseg.losses import parse_loss
from fastseg.metrics import median_frequency_weights
from fastseg.models import DeepSupervision, fading_weights
from fastseg.nn import SyncBatchNorm
from fastseg.training.batches import scoring_batches, training_batches
from fastseg.training.checkpoints import (
    Diverged,
    read_checkpoint,
    refuse_other_data,
    require_finite,
    require_kind,
    write_checkpoint,
)
from fastseg.training.curves import write_curves
from fastseg.training.dataset import Pairs
from fastseg.training.evaluation import Listed, evaluate, pixels, window
from fastseg.training.transforms import Augment

FILES = ("last.pt", "best.pt", "curves.csv", "curves.json", "curves.png")  # that a training writes
LOOK = 10  # steps between reads of the loss, which wait for the device


@dataclass(frozen=True)
class Settings:
    """Everything that decides a learning curve; a checkpoint can be resumed only with the same settings."""

    model: str
    options: dict[str, Any]
    classes: tuple[str, ...]
    epochs: int
    batch: int  # pictures of all processes together
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["poly", "onecycle", "constant"] = "poly"
    class_weights: Literal["none", "median-frequency"] = "none"
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = True
    amp: str = "none"
    seed: int = 0
    deep_supervision: Literal["constant", "fading"] | None = None
    supervise: tuple[str | int, ...] | None = None  # where the heads of a ``DeepSupervision`` are
    loss: str = "ce"  # names and weights, as ``fastseg.losses.parse_loss`` takes them


class ShareOfLoss(nn.Module):
    """This process's share of the mean loss over the whole batch; DistributedDataParallel wraps it.

        sum of the losses of its pixels * processes / sum of the class weights of all processes' pixels

    DDP averages gradients, so they equal those of one process with the whole batch, even if parts ignore pixels. Other
    losses than cross entropy are means over images, or over the batch of all processes.
    """

    def __init__(self, model: nn.Module, weight: Tensor | None, void: int, loss: str = "ce"):
        super().__init__()
        self.model, self.void = model, void
        terms = parse_loss(loss, weight=weight)
        self.factors = [factor for factor, _ in terms]
        self.losses = nn.ModuleList(term for _, term in terms) if loss != "ce" else None
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor, labels: Tensor, total: Tensor, heads: Sequence[float] | None = None) -> Tensor:
        """``heads``: factors of the losses of deep supervision."""
        more: dict[str, Any] = {} if heads is None else {"weights": heads}
        if self.losses is not None:
            terms = list(zip(self.factors, self.losses, strict=True))
            return self.model.loss(x, labels, terms=terms, ignore_index=self.void, across_processes=True, **more)
        loss = self.model.loss(x, labels, weight=self.weight, ignore_index=self.void, reduction="sum", **more)
        return loss / total

    def weights_in(self, labels: Tensor, processes: Processes) -> Tensor:
        """The divisor: the sum of the class weights of the pixels, averaged over processes."""
        counted = labels != self.void
        if self.weight is None:
            total = counted.sum().float()
        else:
            total = self.weight[torch.where(counted, labels, 0).long()].mul(counted).sum()
        if processes.count > 1:
            dist.all_reduce(total)
        return total.clamp(min=1e-12) / processes.count  # a batch of nothing but void has the loss 0


def train(
    model: nn.Module,
    settings: Settings,
    train_set: Pairs,
    val_set: Pairs,
    output: Path,
    processes: Processes,
    *,
    workers: int = 0,
    resume: bool = False,
    save_every: int | None = None,
    max_seconds: float | None = None,
    stop_asked: Callable[[], object] = lambda: False,
    data: Mapping[str, Any] | None = None,
    changed_data: bool = False,
) -> list[dict]:
    """Train; write ``last.pt``, ``best.pt`` (by mean IoU on ``val_set``) and the curves into ``output``.

    If ``stop_asked()`` returns True in one process, all stop with a checkpoint: after the step, or during the scoring,
    which a resumed run repeats. Several GPUs ask every ``LOOK`` steps. ``best.pt`` is written before the ``last.pt``
    that refers to it, so the best weights survive whatever ends the process in between.

    Args:
        model: with ``loss`` and ``predict``.
        settings: everything that decides the curve.
        train_set: pairs to learn from.
        val_set: pairs to score each epoch on.
        output: an existing folder.
        processes: that work together.
        workers: number of processes that read pictures.
        resume: continue the run in ``output``.
        save_every: steps between checkpoints within an epoch.
        max_seconds: time after which to stop with a checkpoint.
        stop_asked: called after each step.
        data: marks of the data set, plain data; a resumed run with other marks is refused.
        changed_data: continue with other data; the epoch begins again.

    Returns:
        The curve: a row for each finished epoch.

    Raises:
        ValueError: the data is bad, loss or weights are not finite, the folder holds a run and ``resume`` is False, or
            the resumed run had other settings or other data.
        OSError: a checkpoint cannot be written.
    """
    last, start = output / "last.pt", time.perf_counter()
    described = dataclasses.asdict(settings)
    if last.exists() != resume:
        what = "no checkpoint is there to resume" if resume else "a run is there; give --resume, or another -o"
        raise ValueError(f"{last}: {what}")
    saved = read_checkpoint(last, described) if resume else None
    spec, device, pin = train_set.spec, processes.device, processes.device.type == "cuda"
    weight = None
    if settings.class_weights == "median-frequency":
        labels = (torch.from_numpy(label) for label in train_set.labels())
        weight = median_frequency_weights(labels, len(spec.classes), ignore_index=spec.ignore_index).to(device)
    inner = lambda: model.model if isinstance(model, DeepSupervision) else model  # without the heads, as it is used
    changed = saved is not None and refuse_other_data(last, saved["training"], data or {}, changed_data)
    if saved is not None:
        with _of_this_run(last):
            inner().load_state_dict(saved["state_dict"])
            if inner() is not model:
                model.heads.load_state_dict(saved["training"]["heads"])
    model = model.to(device, memory_format=torch.channels_last)
    if processes.count > 1:
        model = SyncBatchNorm.convert_sync_batchnorm(model)
    share = ShareOfLoss(model.train(), weight, spec.void, settings.loss)
    step_of = DistributedDataParallel(share, broadcast_buffers=False) if processes.count > 1 else share
    augment = Augment(settings.size, settings.scale, settings.crop, settings.flip, spec.void)
    loader, sampler = training_batches(train_set, augment, settings.batch, settings.seed, processes, workers, pin)
    val_loader = scoring_batches(val_set, settings.size, 1, processes, workers, pin)
    steps = len(loader)
    optimizer, schedule = _optimizer(model, settings, steps * settings.epochs)
    amp = None if settings.amp == "none" else getattr(torch, settings.amp)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    state = {"epoch": 0, "done": 0, "loss": 0.0, "best": -1.0, "history": []}
    parts = {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    if saved is not None:
        with _of_this_run(last):
            for name, part in (("state", state), *((name, part.state_dict()) for name, part in parts.items())):
                require_kind(saved["training"] if name == "state" else saved["training"][name], part, name)
            for row in saved["training"]["history"]:
                require_kind(row, {"epoch": 1, "mean_iou": 0.0}, "a row of the history")
            state = {key: saved["training"][key] for key in state}
            fresh = [{k: value for k, value in group.items() if k != "params"} for group in optimizer.param_groups]
            for name, part in parts.items():
                if not (changed and name == "schedule"):
                    part.load_state_dict(saved["training"][name])
        if changed:  # other pictures, perhaps another number of steps: the epoch begins again
            state |= {"done": 0, "loss": 0.0}
            for group, begun in zip(optimizer.param_groups, fresh, strict=True):
                group.update(begun)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no step of the optimiser came before
                for _ in range(state["epoch"] * steps):
                    schedule.step()

    def described_weights() -> dict[str, Any]:
        weights = {key: value.detach().cpu() for key, value in inner().state_dict().items()}
        about = {"model": settings.model, "options": settings.options, "classes": list(settings.classes)}
        return about | {"state_dict": weights}

    def save(marks: Mapping[str, Any] = data or {}) -> None:
        require_finite(model.state_dict(), state["epoch"] * steps + state["done"])  # in all processes alike
        if processes.first:
            training = {name: part.state_dict() for name, part in parts.items()} | state
            training |= {"settings": described, "data": dict(marks)}
            if inner() is not model:
                training["heads"] = {key: value.detach().cpu() for key, value in model.heads.state_dict().items()}
            write_checkpoint(last, described_weights() | {"training": training})

    stop = False
    while state["epoch"] < settings.epochs:
        epoch, first = state["epoch"], state["done"]
        sampler.set_epoch(epoch)
        sampler.skip = first * settings.batch // processes.count
        running, began = torch.tensor(state["loss"], dtype=torch.float64, device=device), time.perf_counter()
        bar = progress(Listed(loader), f"epoch {epoch + 1}/{settings.epochs}", "batch", shown=processes.first)
        try:
            for images, labels in bar:
                step = epoch * steps + state["done"]
                torch.manual_seed((settings.seed << 32) + step * processes.count + processes.rank)  # of dropout
                labels = window(labels, model).to(device, non_blocking=True)
                total = share.weights_in(labels, processes)
                with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
                    loss = step_of(pixels(images, device), labels, total, _heads(model, settings, step, steps))
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                running += loss.detach()
                state["done"] += 1
                end = state["done"] == steps
                late = max_seconds is not None and time.perf_counter() - start > max_seconds
                look = end or state["done"] % LOOK == 0
                if look:
                    rate = (state["done"] - first) * settings.batch / (time.perf_counter() - began)
                    bar.set_postfix_str(f"loss {_finite(loss, step):.3f}, {rate:.1f} images/s")
                cheap = processes.count == 1 or device.type == "cpu"  # to ask the others
                stop = (look or cheap) and processes.sum(late or bool(stop_asked()))[0] > 0
                if (stop or (save_every and state["done"] % save_every == 0)) and not end:
                    _finite(loss, step)
                    state["loss"] = processes.sum(running.item())[0] / processes.count
                    save()
                    if stop:
                        return state["history"]
        except Diverged:
            raise
        except ValueError:
            if processes.count == 1:  # bad data: nothing is lost, and the file at fault will have to change
                state["loss"] = running.item()
                save(marks={})
            raise
        require_finite(model.state_dict(), (epoch + 1) * steps)  # in all processes
        mean = processes.sum(running.item())[0] / processes.count
        title = f"score {epoch + 1}/{settings.epochs}"
        scores = evaluate(model, val_loader, spec, processes, amp=amp, title=title, stop=stop_asked).scores
        if processes.sum(bool(stop_asked()))[0] > 0:  # in all processes, as one of them may have left pictures out
            state["loss"] = mean
            save()
            return state["history"]
        row = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * steps,
            "lr": schedule.get_last_lr()[0],
            "loss": mean / steps,
            "pixel_accuracy": scores.pixel_accuracy,
            "mean_pixel_accuracy": scores.mean_pixel_accuracy,
            "mean_iou": scores.mean_iou,
            "seconds": time.perf_counter() - began,
        }
        better = scores.mean_iou > state["best"]
        if better and processes.first:
            try:
                write_checkpoint(output / "best.pt", described_weights())
            except OSError:
                state["loss"] = mean  # a resumed run scores this epoch again
                save()
                raise
        state |= {"epoch": epoch + 1, "done": 0, "loss": 0.0, "history": [*state["history"], row]}
        state["best"] = max(state["best"], scores.mean_iou)
        save()
        if processes.first:
            bar.write(
                f"epoch {row['epoch']}/{settings.epochs}: loss {row['loss']:.4f}, val mIoU {scores.mean_iou:.4f}, "
                f"pixel accuracy {scores.pixel_accuracy:.4f}, {row['seconds']:.0f} s{', the best so far' * better}"
            )
            write_curves(output, state["history"])
        if stop:
            break
    return state["history"]


def _heads(model: nn.Module, settings: Settings, step: int, steps: int) -> list[float] | None:
    """Factors of the losses of deep supervision in this step, with ``steps`` per epoch; None: the model's own."""
    if settings.deep_supervision != "fading":
        return None
    return fading_weights(model.supervised, step / (steps * settings.epochs))


def _finite(loss: Tensor, step: int) -> float:
    value = loss.item()
    if value != value or abs(value) == float("inf"):
        raise Diverged(f"training diverged: the loss is {value} at step {step}; try a smaller --lr")
    return value


@contextmanager
def _of_this_run(path: Path) -> Iterator[None]:
    """Check that what is taken from a checkpoint fits; raise one error if not."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no checkpoint of this run: {first_line(error)}") from error


def _optimizer(model: nn.Module, settings: Settings, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay)
    match settings.schedule:
        case "poly":
            return optimizer, PolynomialLR(optimizer, steps, power=0.9)
        case "onecycle":
            return optimizer, OneCycleLR(optimizer, settings.lr, total_steps=steps + 1)
        case _:
            return optimizer, ConstantLR(optimizer, 1.0)
