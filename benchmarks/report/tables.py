"""Floors, and measured times beside them, as markdown tables.

Without results a table shows every case and its floors (``docs/roofline.md``); with results it shows what was
measured and nothing else (``docs/results.md``), and is empty if nothing was.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from benchmarks import (
    bench_batch_norm_act,
    bench_bilinear_conv_transpose,
    bench_models,
    bench_pooling,
    bench_separable_conv,
    bench_upsample_bilinear,
    bench_upsample_concat,
    bench_upsample_heads,
)
from benchmarks.problem import Case
from benchmarks.report import record
from benchmarks.roofline.floors import DEVICES, Device, find_device, floor_of, floor_us
from benchmarks.roofline.model_layers import walk
from benchmarks.roofline.op_tables import STRATEGIES
from benchmarks.workloads import MODELS_WITHOUT_FLOOR, SEPARABLE, SEPARABLE_TRAINING, ModelShape, SeparableShape

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


def op_times(stages: dict[str, dict], op: str) -> dict[tuple[str, str, str], float]:
    """(shape, mode, provider) -> microseconds; fastseg's with tuned configurations where those were measured."""
    rows = [row for row in counted(stages, "ops", "ops-tuned") if row.get("op") == op]
    return {(row["shape"], row["mode"], row["provider"]): row["median_us"] for row in rows}


def predictions(stages: dict[str, dict], op: str) -> dict[tuple[str, str], tuple[float, float]]:
    """(shape, mode) -> microseconds by the static model, and measured over predicted, of rows that have them."""
    rows = [row for row in counted(stages, "ops", "ops-tuned") if row.get("op") == op and "predicted_us" in row]
    return {(row["shape"], row["mode"]): (row["predicted_us"], row["of_predicted"]) for row in rows}


def step_time(times: dict[tuple[str, str, str], float], shape: str, provider: str) -> float | None:
    """Forward and backward of a training step together, microseconds."""
    halves = [times.get((shape, mode, provider)) for mode in ("train-forward", "train-backward")]
    return None if None in halves else sum(halves)


def chip_of(gpu: str) -> Device:
    """Whose floors to show for ``gpu``, the stem of a results file."""
    return find_device(gpu.replace("_", " ")) or DEFAULT


class Row(NamedTuple):
    """A line of a table."""

    floors: list[str]  # names the case and gives its floors
    times: list[str]  # what was measured, and its ratios
    measured: bool


def _table(floors: list[str], times: list[str], rows: list[Row], stages: dict[str, dict]) -> str:
    """Headers and rows as markdown: floors alone without ``stages``, else what was measured, or ""."""
    if not stages:
        return _markdown(floors, [row.floors for row in rows])
    measured = [row.floors + row.times for row in rows if row.measured]
    return _markdown([*floors, *times], measured) if measured else ""


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ratio(slow: float | None, fast: float | None) -> str:
    return "" if slow is None or fast is None else f"{slow / fast:.2f}x"


def _share(floor: float, time: float | None) -> str:
    return "" if time is None else f"{floor / time:.0%}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def _separable(gpu: str, stages: dict[str, dict], shapes: tuple[SeparableShape, ...], training: bool) -> str:
    times, chip = op_times(stages, bench_separable_conv.OP), chip_of(gpu)
    names = ["shape", "floor us: eager / compile / fused"]
    measured = ["eager us", "compile us", "fastseg us", "vs eager", "vs compile", "% of roofline"]
    rows = []
    for s in shapes:
        floors = [floor_us(s, chip, training=training, strategy=strategy).us for strategy in STRATEGIES]
        if training:  # the depthwise map may be stored or computed again; the lower floor is the one to be judged by
            floors[2] = min(floors[2], floor_us(s, chip, training=True, recompute=True).us)
        eager, compiled, ours = (
            step_time(times, s.name, name) if training else times.get((s.name, "eval", name)) for name in PROVIDERS
        )
        label = f"{s.name} ({s.N}x{s.C}x{s.H}x{s.W} -> {s.COUT})"
        ratios = [_ratio(eager, ours), _ratio(compiled, ours), _share(floors[2], ours)]
        times_of = [_us(eager), _us(compiled), _us(ours), *ratios]
        rows.append(Row([label, " / ".join(f"{us:.1f}" for us in floors)], times_of, ours is not None))
    return _table(names, measured, rows, stages)


def separable_eval(gpu: str, stages: dict[str, dict]) -> str:
    """Inference of the separable convolution, per shape."""
    return _separable(gpu, stages, SEPARABLE, training=False)


def separable_train(gpu: str, stages: dict[str, dict]) -> str:
    """Training step (forward + backward, batch statistics) of the separable convolution, per shape."""
    return _separable(gpu, stages, SEPARABLE_TRAINING, training=True)


def op_table(
    module: ModuleType, *baselines: str, shown: Callable[[Case], bool] = lambda case: True
) -> Callable[[str, dict[str, dict]], str]:
    """The table of one op: each case that is ``shown``, its floor, and the times of fastseg and of the baselines."""

    def table(gpu: str, stages: dict[str, dict]) -> str:
        times, chip = op_times(stages, module.OP), chip_of(gpu)
        header = [*(f"{b} us" for b in baselines), "fastseg us", *(f"vs {b}" for b in baselines), "% of roofline"]
        told = predictions(stages, module.OP)
        header += ["predicted us", "of predicted"] if told else []
        rows = []
        for case in filter(shown, module.cases("full")):
            floor, ours = case.floor_us("fastseg", chip), times.get((case.shape, case.mode, "fastseg"))
            slow = [times.get((case.shape, case.mode, b)) for b in baselines]
            share = "" if floor is None else _share(floor, ours)
            measured = [*map(_us, slow), _us(ours), *(_ratio(us, ours) for us in slow), share]
            if told:
                us, of = told.get((case.shape, case.mode), (None, None))
                measured += ["" if us is None else _us(us), "" if of is None else f"{of:.2f}"]
            names = [case.shape, case.mode, "" if floor is None else f"{floor:.1f}"]
            rows.append(Row(names, measured, ours is not None))
        return _table(["shape", "mode", "floor us"], header, rows, stages)

    return table


def model_rows(stages: dict[str, dict], mode: str = "eval") -> dict[tuple[str, str, bool], dict]:
    """(shape, provider, as a CUDA graph) -> row."""
    rows = [row for row in counted(stages, "models") if row.get("mode", "eval") == mode]
    return {(row["shape"], row["provider"], row["cuda_graph"]): row for row in rows}


def models(gpu: str, stages: dict[str, dict]) -> str:
    """Whole models: the best of each provider's two ways (called, and as a CUDA graph)."""
    found, chip = model_rows(stages), chip_of(gpu)
    header = [*(f"{p} us: called / graph" for p in PROVIDERS), "images/s", "peak MiB: eager / fastseg",
              "kernels: eager / fastseg"]  # fmt: skip
    rows = []
    for shape in bench_models.SHAPES:
        name = bench_models.label(shape)
        get = lambda provider, graph=False, name=name: found.get((name, provider, graph), {})
        ours = [get("fastseg", graph)["images_per_s"] for graph in (False, True) if get("fastseg", graph)]
        floors = [name, " / ".join(f"{us:.0f}" for us in model_floors(shape, chip) or ())]
        times = [*(_pair(get(p).get("median_us"), get(p, True).get("median_us")) for p in PROVIDERS),
                 f"{max(ours):.0f}" if ours else "-",
                 _pair(get("eager").get("peak_mib"), get("fastseg").get("peak_mib")),
                 _pair(get("eager").get("kernels"), get("fastseg").get("kernels"))]  # fmt: skip
        rows.append(Row(floors, times, bool(ours)))
    return _table(["model", "floor us: eager / compile / fused"], header, rows, stages)


def models_train(gpu: str, stages: dict[str, dict]) -> str:
    """Training steps of whole models: loss and backward, without an optimizer."""
    found, chip = model_rows(stages, "train"), chip_of(gpu)
    header = [*(f"{p} ms" for p in PROVIDERS), "vs eager", "vs compile", "peak MiB: eager / fastseg",
              "MB kept: eager / fastseg"]  # fmt: skip
    rows = []
    for shape in bench_models.TRAINING:
        name = bench_models.label(shape)
        get = lambda provider, field, name=name: found.get((name, provider, False), {}).get(field)
        times = [get(p, "median_us") for p in PROVIDERS]
        kept = [None if get(p, "kept_bytes") is None else get(p, "kept_bytes") / 1e6 for p in ("eager", "fastseg")]
        floors = [name, " / ".join(f"{us / 1e3:.1f}" for us in model_floors(shape, chip, training=True) or ())]
        measured = [*(_us(None if us is None else us / 1e3) for us in times), _ratio(times[0], times[2]),
                    _ratio(times[1], times[2]), _pair(get("eager", "peak_mib"), get("fastseg", "peak_mib")),
                    _pair(*kept)]  # fmt: skip
        rows.append(Row(floors, measured, times[2] is not None))
    return _table(["model", "floor ms: eager / compile / fused"], header, rows, stages)


def _pair(a: float | None, b: float | None) -> str:
    return "-" if a is None and b is None else " / ".join("-" if v is None else f"{v:.0f}" for v in (a, b))


def model_floors(shape: ModelShape, chip: Device, *, training: bool = False) -> list[float] | None:
    """Microseconds of the eager, compile and fused floors; None where the model's layers have no walk."""
    if shape in MODELS_WITHOUT_FLOOR:
        return None
    return [floor_of(walk(shape, strategy, training=training).kernels, chip).us for strategy in STRATEGIES]


def machine(gpu: str, stages: dict[str, dict]) -> str:
    """What was measured on, and what that machine can do."""
    env = stages.get("env", {})
    if not env.get("machine"):
        return "" if stages else f"Floors are those of an {DEFAULT.name}."
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
    "batch-norm-act": op_table(bench_batch_norm_act, "eager", "compile", shown=lambda case: case.N == 16),
    "pooling": op_table(bench_pooling, "eager", "eager channels_last", "compile", shown=lambda case: case.N == 16),
    "upsample-heads": op_table(bench_upsample_heads, "eager", "compile"),
    "upsample-bilinear": op_table(
        bench_upsample_bilinear, "eager", "compile", shown=lambda case: " " not in case.shape
    ),
    "upsample-concat": op_table(bench_upsample_concat, "eager", "compile"),
    "bilinear-conv-transpose": op_table(bench_bilinear_conv_transpose, "eager", "grouped", "grouped-compile"),
    "models": models,
    "models-train": models_train,
    "machine": machine,
}
