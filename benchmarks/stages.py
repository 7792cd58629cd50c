"""The stages of ``gpu.py``: each measures one thing in a process of its own and notes rows as it goes.

A stage is ``f(log, device, tiny)``. It asks ``log.time_left()`` before each piece of work, the most valuable first, and
names in ``log.left_out`` what there was no time for. ``tiny`` is the rehearsal: small shapes, any device.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import bench_atrous
import bench_batch_norm_act
import bench_bilinear_conv_transpose
import bench_conv_act
import bench_inverted_residual
import bench_models
import bench_pooling
import bench_separable_conv as bench
import bench_upsample_bilinear
import bench_upsample_concat
import bench_upsample_concat_conv
import bench_upsample_heads
import harness
import record
import torch
import workloads
from problem import Case, Problem
from record import Log

from fastseg.inference.graphs import captured
from fastseg.measure.timing import interleaved
from fastseg.ops.core.explain import explain

OPS = (
    bench,
    bench_atrous,
    bench_batch_norm_act,
    bench_pooling,
    bench_upsample_heads,
    bench_upsample_bilinear,
    bench_upsample_concat,
    bench_upsample_concat_conv,
    bench_bilinear_conv_transpose,
    bench_inverted_residual,
    bench_conv_act,
)
GPU_TESTS = ("tests/ops", "tests/nn", "tests/models")


def timed(fn: Callable[[], object], device: torch.device, **options) -> harness.Timing:
    """Device times on CUDA, wall-clock on a CPU."""
    if device.type == "cuda":
        return harness.device_times(fn, **options)
    return harness.Timing(interleaved({"fn": fn}, repetitions=3, warmup=1)["fn"], "wall")


# env: what the machine can do, and what performance.md wants to know first.


def env(log: Log, device: torch.device, tiny: bool) -> None:
    dtype = harness.dtype_for(device)
    a = torch.randn(2**20 if tiny else 2**30, device=device).to(dtype)
    b = torch.empty_like(a)
    copied = 2 * a.numel() * a.element_size()
    log.row(what="copy", **harness.summary(timed(partial(b.copy_, a), device), bytes_moved=copied))
    del a, b

    n = 256 if tiny else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))  # random: zeros run faster
    summary = harness.summary(timed(partial(torch.mm, a, b), device))
    log.row(what=f"GEMM {n}^3", **summary, tflop_per_s=2 * n**3 / summary["median_us"] * 1e-6)
    del a, b

    for name, microseconds in _overheads(device).items():
        log.row(what=name, median_us=microseconds)

    for shape in workloads.SEPARABLE:
        if log.time_left() < 2:
            log.left_out.append(f"eager depthwise {shape.name}")
            continue
        problem = bench.Problem(workloads.tiny(shape) if tiny else shape, "eval", device)
        moved = (problem.shape.inputs + problem.shape.hidden) * problem.dtype.itemsize
        with problem.context():
            depthwise = partial(problem.fused.depthwise, problem.x)
            row = harness.summary(timed(depthwise, device), bytes_moved=moved)
        log.row(what="eager depthwise, channels_last", shape=shape.name, **row)


def _overheads(device: torch.device, calls: int = 200) -> dict[str, float]:
    """Microseconds of host time per eager op and per Triton launch, and of device time per node of a CUDA graph."""
    x = torch.zeros(32, device=device)

    def many(fn: Callable[[], object]) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(calls):
                fn()

        return repeat

    def host_us(fn: Callable[[], object]) -> float:
        repeat = many(fn)
        repeat()
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        repeat()  # returns when all are queued
        return (time.perf_counter() - begin) / calls * 1e6

    out = {"eager op, host": host_us(lambda: x.add_(1))}
    if device.type == "cuda":
        module = torch.nn.BatchNorm2d(32, device=device).eval()
        fused = bench.SeparableConv2d(32, 32).eval().to(device)
        image = torch.zeros(1, 32, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            out["BatchNorm2d, host"] = host_us(lambda: module(image))
            out["fastseg separable_conv2d, host"] = host_us(lambda: fused(image))
        replay = captured(many(lambda: x.add_(1)))
        out["CUDA graph node, device"] = harness.summary(timed(replay, device, graph=False))["median_us"] / calls
    return out


# tests: the kernels compiled for real. Times on red tests do not count.


def tests(log: Log, device: torch.device, tiny: bool) -> None:
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not tiny else []  # compiling takes most of the time
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = ["tests/kernels/test_config.py"] if tiny else GPU_TESTS
        command = [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "-q",
            *workers,
            f"--junitxml={report}",
            "-p",
            "no:cacheprovider",
        ]
        try:
            done = subprocess.run([*command, *paths], cwd=record.ROOT, timeout=max(log.time_left(), 1), check=False)
        except subprocess.TimeoutExpired:
            log.left_out.append("pytest was stopped: no time left; give the stage more with BUDGET=, STAGE=tests")
            log.finish("cut off")
            return
        counts, failed = _junit(report)
    log.row(what="pytest " + " ".join(paths), **counts, failures=failed, exit_status=done.returncode)
    log.finish("passed" if done.returncode == 0 and counts.get("passed") else "failed")


def _junit(report: Path) -> tuple[dict[str, int], list[str]]:
    """Counts of passed, failed and skipped tests, and the names of those that failed."""
    if not report.exists():
        return {}, ["pytest wrote no report"]
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return counts, failed


# ops, ops-tuned: every op against its baselines.


def cases(tiny: bool, wanted: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """The ops' cases in turn, so that each op has its share; the rehearsal takes the first of each op's modes."""
    columns = []
    for module in OPS:
        found = [case for case in module.cases("tiny" if tiny else "full") if wanted(case)]
        columns.append(list({case.mode: case for case in reversed(found)}.values()) if tiny else found)
    return [case for case in chain.from_iterable(zip_longest(*columns)) if case is not None]


def ops(log: Log, device: torch.device, tiny: bool) -> None:
    plain = lambda name: "compile" not in name
    _ops(log, device, tiny, plain)
    if device.type == "cuda":
        forms(log, device, tiny)
        _ops(log, device, tiny, lambda name: not plain(name))  # minutes of compilation: after everything else


def ops_tuned(log: Log, device: torch.device, tiny: bool) -> None:
    _ops(log, device, tiny, lambda name: name.startswith("fastseg"))


def _ops(log: Log, device: torch.device, tiny: bool, chosen: Callable[[str], bool]) -> None:
    compiling = chosen("compile")
    for case in cases(tiny):
        names = {"op": case.op, "shape": case.shape, "N": case.N, "mode": case.mode}
        if log.time_left() < (20 if compiling else 3) and not tiny:
            log.left_out.append(f"{case.op} {case.shape} {case.mode}{', compiled' if compiling else ''}")
            continue
        problem = case.build(device)
        with problem.context():
            functions = problem.functions(*filter(chosen, problem.providers()))
            wrong = problem.disagreement(functions)
            for provider in filter(chosen, functions):
                if wrong:
                    log.row(**names, provider=provider, wrong=wrong)
                    continue
                fn = functions[provider]
                timing = timed(fn, device, **({"graph": not problem.backward} if device.type == "cuda" else {}))
                summary = harness.summary(timing, bytes_moved=problem.bytes_moved, floor_s=case.floor_s(device))
                log.row(
                    **names, provider=provider, dtype=str(problem.dtype), **summary,
                    peak_mib=harness.peak_mib(fn, device), configurations=_sources(provider, fn, device),
                    path=_path(problem, provider), **problem.notes(provider),
                )  # fmt: skip
        del problem, functions
        if device.type == "cuda":
            torch.cuda.empty_cache()


def forms(log: Log, device: torch.device, tiny: bool) -> None:
    """Both forms of the inference path, timed on every shape: what the cost model that chooses is judged by."""
    for case in bench.cases("tiny" if tiny else "full"):
        if case.mode != "eval":
            continue
        if log.time_left() < 3:
            log.left_out.append(f"{case.shape} {case.mode} both forms")
            continue
        problem = case.build(device)
        for form in ("fused", "split"):
            with problem.context(), bench.forced(form):
                fn = problem.function(problem.fused)
                summary = harness.summary(
                    timed(fn, device), bytes_moved=problem.bytes_moved, floor_s=case.floor_s(device)
                )
                names = {"op": case.op, "shape": case.shape, "N": case.N, "mode": case.mode}
                log.row(**names, provider=f"fastseg, {form}", **summary)


def _sources(provider: str, fn: Callable[[], object], device: torch.device) -> list[str]:
    return harness.config_sources(fn, device) if provider.startswith("fastseg") else []


def _path(problem: Problem, provider: str) -> str:
    """Which path and form our op takes; what a baseline takes is its name."""
    if not provider.startswith("fastseg"):
        return ""
    with explain() as report:
        problem.functions(provider)[provider]()
    return "; ".join(f"{decision.path}: {decision.why}" for decision in report)


# tune: launch configurations.


def tune(log: Log, device: torch.device, tiny: bool) -> None:
    from fastseg.kernels.runtime import config
    from fastseg.kernels.tools import tune as search
    from fastseg.kernels.tools import watch as observe

    name = config.gpu_name(device.index) if device.type == "cuda" else "cpu"
    path = (log.path.parent / "tuned" if tiny else config.SHIPPED) / f"{name}.json"
    options = {} if device.type == "cuda" else {"timer": search.wall_us}

    def note(row: observe.Row, trials: list[search.Trial]) -> None:
        chosen = search.best(trials)
        if chosen is not None:
            search.write_table(path, search.entry(row, chosen), gpu=name)
        log.row(
            row=str(row), tried=len(trials), heuristic_us=trials[0].us, best_us=chosen and chosen.us,
            best=chosen and chosen.values, rejected=[f"{t.values}: {t.note}" for t in trials if t.note],
        )  # fmt: skip

    seen: set[observe.Row] = set()
    wanted = cases(tiny, lambda case: case.mode == "eval" if tiny else case.mode != "train-forward")
    for case in wanted[:2] if tiny else wanted:  # interpreted, each takes many seconds
        if log.time_left() < 3 and not tiny:
            log.left_out.append(f"{case.op} {case.shape} {case.mode}")
            continue
        problem = case.build(device)
        with problem.context():
            calls = observe.op_calls(lambda p=problem: p.functions("fastseg")["fastseg"]())
        rows = [(row, call) for row, call in observe.rows_of(calls) if row not in seen]
        seen.update(row for row, _ in rows)
        left = search.tune(rows, note, seconds=log.time_left(), **options)
        log.left_out.extend(str(row) for row in left)


# models: latency, throughput, peak memory, kernels per forward; training steps and what they keep.


def models(log: Log, device: torch.device, tiny: bool) -> None:
    for mode, all_shapes in bench_models.MODES.items():
        for providers in (("fastseg", "eager"), ("compile",)):
            for shape in all_shapes[:1] if tiny else all_shapes:
                if "compile" in providers and device.type == "cpu":
                    continue
                if log.time_left() < (60 if "compile" in providers else 8) and not tiny:
                    log.left_out.append(f"{bench_models.label(shape)} {mode} {'/'.join(providers)}")
                    continue
                shape = replace(shape, H=64, W=64, N=min(shape.N, 2)) if tiny else shape
                _model(log, bench_models.Problem(shape, device, mode), providers)


def _model(log: Log, problem: bench_models.Problem, providers: tuple[str, ...]) -> None:
    device, images = problem.device, problem.shape.N
    with problem.context():
        functions = problem.functions()
        wrong = problem.disagreement({name: functions[name] for name in dict.fromkeys(("eager", *providers))})
        ways = {}
        for name in providers:
            ways[name, False] = functions[name]
            if device.type == "cuda" and problem.mode == "eval":
                ways[name, True] = captured(functions[name])
        samples = interleaved(ways, repetitions=3 if device.type == "cpu" else 50)
        for (name, graph), seconds in samples.items():
            row = {"shape": bench_models.label(problem.shape), "N": images, "mode": problem.mode, "provider": name}
            row["cuda_graph"] = graph
            if wrong:
                log.row(**row, wrong=wrong)
                continue
            summary = harness.summary(harness.Timing(seconds, "wall"))
            log.row(
                **row, dtype=str(problem.dtype), **summary, images_per_s=images / summary["median_us"] * 1e6,
                peak_mib=None if graph else harness.peak_mib(functions[name], device),
                kept_bytes=problem.kept_bytes(name),
                launches=harness.launch_count(functions[name]), kernels=harness.kernel_count(functions[name], device),
            )  # fmt: skip


STAGES: dict[str, Callable[[Log, torch.device, bool], None]] = {
    "env": env, "tests": tests, "ops": ops, "tune": tune, "ops-tuned": ops_tuned, "models": models,
}  # fmt: skip
