"""Models of other libraries on a CPU, optimised: interleaved times against eager, onnxruntime and OpenVINO.

    python -m benchmarks.studies.optimize [--only NAME ...] [--sides 256 512] [--batches 1 8] [--threads 1]

Weights are random; evaluation, fp32, whole calls up to the logits. "eager" is the model in channels_last, "optimized"
what ``fastseg.optimize`` returns, "Runner" and "exact" ``Runner(model, x)`` with and without Winograd's form; the peers
are there where they are installed and can take the model. At one thread and at torch's default. Milliseconds are
medians; "load" is the machine's load average during the row: above the number of threads the machine was busy. The last
line counts the rows in which the Runner is ahead of all.
"""

import argparse
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastseg
from benchmarks.studies.convert import MODELS, declare_operators
from fastseg.inference import Runner
from fastseg.measure.machine import machine
from fastseg.measure.paths import PATHS, Unavailable
from fastseg.measure.timing import interleaved, medians
from fastseg.ops.logits import logits_of

OWN = {
    "fastseg unet": ("unet", {"padding": "same"}),
    "fastseg deeplabv3plus": ("deeplabv3plus", {"backbone": "mobilenet_v2"}),
    "fastseg fcn resnet18": ("fcn", {"backbone": "resnet18"}),
}
PEERS = ("onnxruntime", "openvino", "compile")


class Logits(nn.Module):
    """A model that returns the map of logits alone, which every peer can export."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x))


def make(name: str) -> nn.Module:
    if name in OWN:
        kind, options = OWN[name]
        return fastseg.models.create(kind, 21, **options)
    return Logits(MODELS[name]())


def calls(model: nn.Module, x: Tensor, peers: list[str]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """What is timed, and why the others are not."""
    last = x.contiguous(memory_format=torch.channels_last)
    eager = PATHS["eager-cl"](model, x, torch.float32).call
    optimized = fastseg.optimize(model, last, sizes="given")
    runner, exact = Runner(model, last), Runner(model, last, exact=True)
    found = {"eager": eager, "optimized": lambda: optimized(last)}
    found |= {"Runner": lambda: runner(last), "exact": lambda: exact(last)}
    missing = {}
    for peer in peers:
        try:
            found[peer] = PATHS[peer](model, x, torch.float32).call
        except Unavailable as error:
            missing[peer] = str(error)
    return found, missing


def row(name: str, side: int, batch: int, threads: int, peers: list[str], repetitions: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, x = make(name).eval().requires_grad_(False), torch.randn(batch, 3, side, side)
    with torch.no_grad():
        found, missing = calls(model, x, peers)
        times = medians(interleaved(found, repetitions=repetitions, warmup=2))
    load = os.getloadavg()[0]
    shown = ("eager", "optimized", "Runner", "exact", *peers)
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
    args = parser.parse_args()
    declare_operators()
    print(machine(torch.device("cpu")))
    heads = ["model", "side", "batch", "threads", "eager ms", "optimized", "Runner", "exact", *args.peers, "load"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    ahead, rows = 0, 0
    for threads in args.threads:
        for name in args.only:
            for side in args.sides:
                for batch in args.batches:
                    times = row(name, side, batch, threads, args.peers, args.repetitions)
                    ours = min(times["Runner"], times["exact"])
                    ahead += ours <= min(times.values())
                    rows += 1
    print(f"The Runner is ahead of all in {ahead} of {rows} rows.")


if __name__ == "__main__":
    main()
