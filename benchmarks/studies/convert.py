"""Models of other libraries on a CPU, converted and not: interleaved times against eager, compiled and onnxruntime.

    python -m benchmarks.studies.convert [--only NAME ...] [--side 256] [--no-compile] [--no-onnx] [--out F]

Weights are random; in evaluation, channels_last, fp32, batch 1, at one thread and at torch's default. "eager" is the
model as the library writes it; "converted" the same after ``fastseg.convert``; "frozen" that inside
``fastseg.frozen``, which makes folded weights once. "eager again" is a copy of the eager model: what it differs from 1
is noise. "load" is the machine's load average while it ran: above the number of threads the machine was busy, and the
row says so. Products in G multiplications, of the converted model's eager run.
"""

import argparse
import copy
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fastseg
from fastseg.measure.counting import products_and_bytes
from fastseg.measure.machine import machine
from fastseg.measure.timing import interleaved, medians
from fastseg.ops.logits import logits_of

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
from foreign import declare_operators

SETTLE = 0.01  # s before each sample on several threads: the other runtimes' threads fall asleep


def smp_model(architecture: str, encoder: str, **options: object) -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.create_model(architecture, encoder, encoder_weights=None, classes=21, **options)


def _segformer(depths: list[int], widths: list[int], width: int) -> nn.Module:
    import transformers as hf

    config = hf.SegformerConfig(depths=depths, hidden_sizes=widths, decoder_hidden_size=width, num_labels=150)
    return hf.SegformerForSemanticSegmentation(config)


class Head(nn.Module):
    """SegFormer's head alone, on the four maps that its encoder gives for an image."""

    def __init__(self, widths: list[int], width: int):
        super().__init__()
        import transformers as hf
        from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

        config = hf.SegformerConfig(hidden_sizes=widths, decoder_hidden_size=width, num_labels=150)
        self.decode_head = SegformerDecodeHead(config)
        self.widths = widths

    def inputs(self, side: int) -> tuple[Tensor, ...]:
        """Maps of an image of ``side`` x ``side`` pixels."""
        maps = [torch.randn(1, width, side >> i, side >> i) for i, width in enumerate(self.widths, 2)]
        return tuple(m.to(memory_format=torch.channels_last) for m in maps)

    def forward(self, *maps: Tensor) -> Tensor:
        return self.decode_head(maps)


def torchvision_model(name: str) -> nn.Module:
    import torchvision

    return getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=21)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "SegFormer-B0": lambda: _segformer([2, 2, 2, 2], [32, 64, 160, 256], 256),
    "SegFormer-B2": lambda: _segformer([3, 4, 6, 3], [64, 128, 320, 512], 768),
    "SegFormer-B0, its head": lambda: Head([32, 64, 160, 256], 256),
    "SegFormer-B2, its head": lambda: Head([64, 128, 320, 512], 768),
    "smp segformer mit_b0": lambda: smp_model("segformer", "mit_b0"),
    "smp upernet resnet34": lambda: smp_model("upernet", "resnet34"),
    "smp unet resnet34": lambda: smp_model("unet", "resnet34"),
    "smp unet mobilenet_v2": lambda: smp_model("unet", "mobilenet_v2"),
    "smp unet efficientnet-b0": lambda: smp_model("unet", "efficientnet-b0"),
    "smp fpn resnet34": lambda: smp_model("fpn", "resnet34"),
    "smp pspnet resnet34": lambda: smp_model("pspnet", "resnet34"),
    "smp deeplabv3plus resnet34": lambda: smp_model("deeplabv3plus", "resnet34"),
    "torchvision fcn_resnet50": lambda: torchvision_model("fcn_resnet50"),
    "torchvision deeplabv3_resnet50": lambda: torchvision_model("deeplabv3_resnet50"),
}


class Logits(nn.Module):
    """A copy of a model that returns the map of logits alone, which every peer can export. The exporter changes the
    mode of what it is given."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.train(model.training)

    def forward(self, *x: Tensor) -> Tensor:
        return logits_of(self.model(*x))


def exported(model: nn.Module, x: tuple[Tensor, ...]) -> bytes:
    """An ONNX file of the model: by the older exporter, which takes seconds, or by the newer where that cannot."""
    file = io.BytesIO()
    try:
        torch.onnx.export(Logits(model), x, file, dynamo=False)
    except Exception:
        file = io.BytesIO()
        torch.onnx.export(Logits(model), x, dynamo=True, verbose=False).save(file)
    return file.getvalue()


def providers(
    model: nn.Module, x: tuple[Tensor, ...], compiled: bool, onnx: bool, threads: int
) -> dict[str, Callable[[], object]]:
    converted = fastseg.convert(copy.deepcopy(model), x)
    frozen = fastseg.frozen(converted)
    frozen.__enter__()  # for the whole row; what is not the converted model's is not in it
    found: dict[str, Callable[[], object]] = {"eager": lambda: model(*x), "frozen": lambda: converted(*x)}
    twin, again = copy.deepcopy(converted), copy.deepcopy(model)
    found["converted"], found["eager again"] = (lambda: twin(*x)), (lambda: again(*x))
    if compiled:
        fast = torch.compile(copy.deepcopy(model), mode="max-autotune-no-cudagraphs")
        found["compile"] = lambda: fast(*x)
    if onnx:
        import onnxruntime

        dense, options = tuple(t.contiguous() for t in x), onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(exported(model, dense), options, providers=["CPUExecutionProvider"])
        feed = {given.name: t.numpy() for given, t in zip(session.get_inputs(), dense, strict=True)}
        found["onnxruntime"] = lambda: session.run(None, feed)
    return found


def row(name: str, threads: int, args: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = MODELS[name]().eval().to(memory_format=torch.channels_last)
    x = (torch.randn(1, 3, args.side, args.side).to(memory_format=torch.channels_last),)
    x = model.inputs(args.side) if isinstance(model, Head) else x
    with torch.no_grad():
        calls = providers(model, x, args.compile, args.onnx, threads)
        if any(module.training for module in model.modules()):
            raise RuntimeError(f"{name}: the eager model is in training mode")
        settle = SETTLE if threads > 1 else 0.0
        times = medians(interleaved(calls, repetitions=args.repetitions, warmup=2, settle=settle))
        before, after = (products_and_bytes(calls[key])[0] * 1e-9 for key in ("eager", "frozen"))
    load = os.getloadavg()[0]
    ratios = {key: times["eager"] / seconds for key, seconds in times.items() if key != "eager"}
    busy = "busy machine: not to be quoted" if load > threads + 0.5 else ""
    return {"model": name, "threads": threads, "G": f"{before:.2f} -> {after:.2f}", "eager, ms": times["eager"] * 1e3,
            **ratios, "load": load, "": busy}  # fmt: skip


def table(rows: list[dict[str, object]]) -> str:
    """A table in Markdown; of each form but eager, how many times faster than eager it is."""
    heads = list(dict.fromkeys(key for found in rows for key in found))
    show = lambda value: f"{value:.2f}" if isinstance(value, float) else str(value)
    lines = [heads, ["---"] * len(heads), *([show(found.get(key, "")) for key in heads] for found in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", nargs="*", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-onnx", dest="onnx", action="store_false")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    declare_operators()
    rows = []
    for name in args.only:
        for threads in args.threads:
            rows.append(row(name, threads, args))
            print(rows[-1], flush=True)
    facts = ", ".join(f"{key} {value}" for key, value in machine(torch.device("cpu")).items() if key != "threads")
    text = f"{table(rows)}\n\n{facts}; batch 1, {args.side}^2, fp32, channels_last\n"
    if args.out:
        args.out.write_text(text)
    print(text)
    return text


if __name__ == "__main__":
    main()
