"""Models of other libraries on a CPU, optimised: interleaved times against eager, onnxruntime and OpenVINO.

    python -m benchmarks.studies.optimize [--only NAME ...] [--sides 256 512] [--batches 1 8] [--threads 1] [--files F]

Weights are random; evaluation, fp32, whole calls up to the logits. "eager" is the model in channels_last, "Runner" is
``Runner(model, x)``, "exact" the same without Winograd's form, "optimized" what ``fastseg.optimize`` returns. The peers
(``--peers``) are there where they are installed and can take the model. At one thread and at torch's default.
Milliseconds are medians; "load" is the machine's load average during the row: above the number of threads the machine
was busy. The last line counts the rows in which the Runner is ahead of eager and all foreign peers. With ``--files``
the ONNX file of a model is kept in a folder and read there again; delete it when a version of a library changes.
"""

import argparse
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fastseg
from benchmarks.studies.convert import MODELS as CONVERTED
from benchmarks.studies.convert import Logits, declare_operators, smp_model, torchvision_model
from fastseg.inference import Runner
from fastseg.io.quiet import quiet
from fastseg.measure.comparison import eager_form
from fastseg.measure.machine import machine
from fastseg.measure.paths import PATHS, Unavailable
from fastseg.measure.timing import interleaved, medians

SMP = ("unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus", "pan", "upernet",
       "segformer")  # fmt: skip
VIT = "tu-vit_tiny_patch16_224.augreg_in21k"
MODELS: dict[str, Callable[[], nn.Module]] = {
    **CONVERTED,
    **{
        f"smp {name} {encoder}": lambda name=name, encoder=encoder: smp_model(name, encoder)
        for name in SMP
        for encoder in ("resnet34", "mobilenet_v2")
    },
    "smp dpt vit_tiny": lambda: smp_model("dpt", VIT, dynamic_img_size=True),
    "torchvision lraspp_mobilenet_v3_large": lambda: torchvision_model("lraspp_mobilenet_v3_large"),
}
OWN = {
    "fastseg unet": ("unet", {"padding": "same"}),
    "fastseg deeplabv3plus": ("deeplabv3plus", {"backbone": "mobilenet_v2"}),
    "fastseg fcn resnet18": ("fcn", {"backbone": "resnet18"}),
}
SETTLE = 0.01  # seconds, on several threads
PEERS = ("optimized", "exact", "onnxruntime", "openvino", "compile")


def make(name: str) -> nn.Module:
    if name in OWN:
        kind, options = OWN[name]
        return fastseg.models.create(kind, 21, **options)
    return Logits(MODELS[name]())


def calls(
    model: nn.Module, x: Tensor, peers: list[str], file: Path
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """What is timed, and why the others are not; ``file`` is the model's ONNX file, exported if it is not there."""
    last = x.contiguous(memory_format=torch.channels_last)
    eager = PATHS["eager-cl"](model, x, torch.float32).call
    runner = Runner(model, last)
    found = {"eager": eager, "Runner": lambda: runner(last)}
    if "optimized" in peers:
        optimized = fastseg.optimize(model, last, sizes="given")
        found["optimized"] = lambda: optimized(last)
    if "exact" in peers:
        exact = Runner(model, last, exact=True)
        found["exact"] = lambda: exact(last)
    missing = {}
    for peer in (each for each in peers if each not in found):
        try:
            if peer == "compile":
                found[peer] = PATHS[peer](model, x, torch.float32).call
            else:
                if importlib.util.find_spec(peer) is None:
                    raise Unavailable(f"{peer} is not installed")
                exported(model, x, file)
                found[peer] = SESSIONS[peer](file, x)
        except Unavailable as error:
            missing[peer] = str(error)
    return found, missing


def exported(model: nn.Module, x: Tensor, file: Path) -> None:
    """Write the model's eager form as an ONNX file, if it is not there: by the older exporter, which takes seconds, or
    by the newer where that cannot."""
    plain, error = eager_form(model), None
    for newer in () if file.exists() else (False, True):
        try:
            with quiet(), warnings.catch_warnings(action="ignore"):
                if newer:
                    torch.onnx.export(plain, (x,), dynamo=True, verbose=False).save(file)
                else:
                    torch.onnx.export(plain, (x,), file, dynamo=False, opset_version=17)
            return
        except Exception as failed:
            error = failed
            file.unlink(missing_ok=True)
    if error is not None:
        raise Unavailable(f"ONNX export: {str(error).partition(chr(10))[0]}") from error


def onnxruntime_call(file: Path, x: Tensor) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def openvino_call(file: Path, x: Tensor) -> Callable[[], object]:
    import openvino

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request, feed = openvino.Core().compile_model(str(file), "CPU", options).create_infer_request(), x.numpy()
    return lambda: request.infer([feed])


SESSIONS = {"onnxruntime": onnxruntime_call, "openvino": openvino_call}


def row(
    name: str, side: int, batch: int, threads: int, peers: list[str], repetitions: int, folder: Path
) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, x = make(name).eval().requires_grad_(False), torch.randn(batch, 3, side, side)
    with torch.no_grad():
        found, missing = calls(model, x, peers, folder / f"{name} {side} {batch}.onnx".replace(" ", "_"))
        times = medians(interleaved(found, repetitions=repetitions, warmup=2, settle=SETTLE if threads > 1 else 0))
    load = os.getloadavg()[0]
    shown = ("eager", "Runner", *peers)
    cells = [f"{times[each] * 1e3:.1f}" if each in times else "-" for each in shown]
    print(f"| {name} | {side} | {batch} | {threads} | {' | '.join(cells)} | {load:.1f} |", flush=True)
    for peer, why in missing.items():
        print(f"<!-- {name}: {peer}: {why} -->", flush=True)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*MODELS, *OWN], default=[*MODELS, *OWN])
    parser.add_argument("--sides", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--files", type=Path, help="folder in which ONNX files are kept; default: none is kept")
    args = parser.parse_args()
    declare_operators()
    with tempfile.TemporaryDirectory() as passing:
        study(args, args.files or Path(passing))


def study(args: argparse.Namespace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    print(machine(torch.device("cpu")))
    heads = ["model", "side", "batch", "threads", "eager ms", "Runner", *args.peers, "load"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    ahead, rows = 0, 0
    for threads in args.threads:
        for name in args.only:
            for side in args.sides:
                for batch in args.batches:
                    times = row(name, side, batch, threads, args.peers, args.repetitions, folder)
                    others = (time for each, time in times.items() if each not in ("Runner", "optimized", "exact"))
                    ahead += times["Runner"] <= min(others)
                    rows += 1
    print(f"The Runner is ahead of all in {ahead} of {rows} rows.")


if __name__ == "__main__":
    main()
