"""Measured times beside their floors, as markdown tables. What no file in ``results/`` holds is "not measured yet"."""

from pathlib import Path

import bench_models
import record
from floors import DEVICES, Device, find_device, floor_of, floor_us
from model_layers import walk
from op_tables import STRATEGIES
from workloads import SEPARABLE, SEPARABLE_TRAINING, ModelShape, SeparableShape

MISSING = "not measured yet"
PROVIDERS = ("eager", "compile", "fastseg")  # in the order of floors.STRATEGIES, whose "fused" is ours
DEFAULT = DEVICES["H200"]  # whose floors are shown where nothing was measured


def counted(stages: dict[str, dict], *names: str) -> list[dict]:
    """Rows of the stages, in order, that count: taken beside passing tests, from providers that agree."""
    rows = []
    for name in names:
        stage = stages.get(name, {})
        if stage.get("tests") == "passed":
            rows += [row for row in stage.get("rows", []) if "wrong" not in row and "median_us" in row]
    return rows


def all_results(folder: Path = record.RESULTS) -> dict[str, dict[str, dict]]:
    """GPU -> stages, of each results file."""
    return {path.stem: record.read(path) for path in sorted(folder.glob("*.json"))}


def op_times(stages: dict[str, dict]) -> dict[tuple[str, str, str], float]:
    """(shape, mode, provider) -> microseconds; fastseg's with tuned configurations where those were measured."""
    return {(r["shape"], r["mode"], r["provider"]): r["median_us"] for r in counted(stages, "ops", "ops-tuned")}


def step_time(times: dict[tuple[str, str, str], float], shape: str, provider: str) -> float | None:
    """Forward and backward of a training step together, microseconds."""
    halves = [times.get((shape, mode, provider)) for mode in ("train-forward", "train-backward")]
    return None if None in halves else sum(halves)


def chip_of(gpu: str) -> Device:
    """Whose floors to show for ``gpu``, the stem of a results file."""
    return find_device(gpu.replace("_", " ")) or DEFAULT


def _us(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ratio(slow: float | None, fast: float | None) -> str:
    return "" if slow is None or fast is None else f"{slow / fast:.2f}x"


def _share(floor: float, time: float | None) -> str:
    return "" if time is None else f"{floor / time:.0%}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def _separable(gpu: str, stages: dict[str, dict], shapes: tuple[SeparableShape, ...], training: bool) -> str:
    times, chip = op_times(stages), chip_of(gpu)
    header = ["shape", "floor us: eager / compile / fused", "eager us", "compile us", "fastseg us", "vs eager",
              "vs compile", "% of roofline"]  # fmt: skip
    rows = []
    for s in shapes:
        floors = [floor_us(s, chip, training=training, strategy=strategy).us for strategy in STRATEGIES]
        if training:  # the depthwise map may be stored or computed again; the lower floor is the one to be judged by
            floors[2] = min(floors[2], floor_us(s, chip, training=True, recompute=True).us)
        eager, compiled, ours = (
            step_time(times, s.name, name) if training else times.get((s.name, "eval", name)) for name in PROVIDERS
        )
        rows.append([f"{s.name} ({s.N}x{s.C}x{s.H}x{s.W} -> {s.COUT})", " / ".join(f"{us:.1f}" for us in floors),
                     _us(eager), _us(compiled), _us(ours), _ratio(eager, ours), _ratio(compiled, ours),
                     _share(floors[2], ours)])  # fmt: skip
    return _markdown(header, rows)


def separable_eval(gpu: str, stages: dict[str, dict]) -> str:
    """Inference of the separable convolution, per shape."""
    return _separable(gpu, stages, SEPARABLE, training=False)


def separable_train(gpu: str, stages: dict[str, dict]) -> str:
    """Training step (forward + backward, batch statistics) of the separable convolution, per shape."""
    return _separable(gpu, stages, SEPARABLE_TRAINING, training=True)


def _other(op: str):
    """The table of one op of ``op_stages``: its rows beside each other, or where to find its floors."""

    def make(gpu: str, stages: dict[str, dict]) -> str:
        rows = [row for row in counted(stages, "other-ops") if row["op"] == op]
        if not rows:
            return f"{MISSING[0].upper()}{MISSING[1:]}. Floors of every shape: `make roofline`."
        found: dict[tuple[str, str], dict[str, dict]] = {}
        for row in rows:
            found.setdefault((row["mode"], row["shape"]), {})[row["provider"]] = row
        others = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "fastseg"]
        lines = []
        for (mode, shape), by in found.items():
            time = lambda name, by=by: by.get(name, {}).get("median_us")
            ours = time("fastseg")
            share = by.get("fastseg", {}).get("roofline")
            lines.append([mode, shape, *(_us(time(name)) for name in others), _us(ours), _ratio(time("eager"), ours),
                          "" if share is None else f"{share:.0%}"])  # fmt: skip
        header = ["mode", "shape", *(f"{name} us" for name in others), "fastseg us", "vs eager", "% of roofline"]
        return _markdown(header, lines)

    make.__doc__ = f"Times of {op}, per mode and shape."
    return make


def model_rows(stages: dict[str, dict]) -> dict[tuple[str, str, bool], dict]:
    """(shape, provider, as a CUDA graph) -> row."""
    return {(row["shape"], row["provider"], row["cuda_graph"]): row for row in counted(stages, "models")}


def models(gpu: str, stages: dict[str, dict]) -> str:
    """Whole models: the best of each provider's two ways (called, and as a CUDA graph)."""
    found, chip = model_rows(stages), chip_of(gpu)
    header = ["model", "floor us: eager / compile / fused", *(f"{p} us: called / graph" for p in PROVIDERS),
              "images/s", "peak MiB: eager / fastseg", "kernels: eager / fastseg"]  # fmt: skip
    rows = []
    for shape in bench_models.SHAPES:
        name = bench_models.label(shape)
        get = lambda provider, graph=False, name=name: found.get((name, provider, graph), {})
        ours = [get("fastseg", graph)["images_per_s"] for graph in (False, True) if get("fastseg", graph)]
        rows.append([name, " / ".join(f"{us:.0f}" for us in model_floors(shape, chip)),
                     *(_pair(get(p).get("median_us"), get(p, True).get("median_us")) for p in PROVIDERS),
                     f"{max(ours):.0f}" if ours else MISSING,
                     _pair(get("eager").get("peak_mib"), get("fastseg").get("peak_mib")),
                     _pair(get("eager").get("kernels"), get("fastseg").get("kernels"))])  # fmt: skip
    return _markdown(header, rows)


def _pair(a: float | None, b: float | None) -> str:
    return MISSING if a is None and b is None else " / ".join("-" if v is None else f"{v:.0f}" for v in (a, b))


def model_floors(shape: ModelShape, chip: Device) -> list[float]:
    """Microseconds of the eager, compile and fused floors."""
    return [floor_of(walk(shape, strategy).kernels, chip).us for strategy in STRATEGIES]


def machine(gpu: str, stages: dict[str, dict]) -> str:
    """What was measured on, and what that machine can do."""
    env = stages.get("env", {})
    if not env.get("machine"):
        return f"No GPU has been at hand: {MISSING}. Floors are those of an {DEFAULT.name}."
    m = env["machine"]
    lines = [f"{m['chip']}, driver {m['driver']}, torch {m['torch']}, Triton {m['triton']}, {m['date'][:10]}."]
    for row in env.get("rows", []):
        rate = f", {row['gb_per_s']:.0f} GB/s" if "gb_per_s" in row else ""
        rate += f", {row['tflop_per_s']:.0f} TFLOP/s" if "tflop_per_s" in row else ""
        lines.append(f"- {row['what']}{' ' + row['shape'] if 'shape' in row else ''}: {row['median_us']:.1f} us{rate}")
    return "\n".join(lines)


TABLES = {
    "separable-eval": separable_eval,
    "separable-train": separable_train,
    "pooling": _other("pooling"),
    "upsample-heads": _other("upsample_heads"),
    "upsample-bilinear": _other("upsample_bilinear"),
    "bilinear-conv-transpose": _other("bilinear_conv_transpose"),
    "models": models,
    "machine": machine,
}
