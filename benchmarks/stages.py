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
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import bench_models
import bench_separable_conv as bench
import harness
import op_stages
import record
import torch
import workloads
from record import Log

from fastseg.inference.timing import interleaved
from fastseg.ops._dispatch import explain

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
        replay = harness.captured(many(lambda: x.add_(1)))
        out["CUDA graph node, device"] = harness.summary(timed(replay, device, graph=False))["median_us"] / calls
    return out


# tests: the kernels compiled for real. Times on red tests do not count.


def tests(log: Log, device: torch.device, tiny: bool) -> None:
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not tiny else []  # compiling takes most of the time
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = ["tests/test_config.py"] if tiny else GPU_TESTS
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


# ops, ops-tuned: separable convolution against its baselines.


def _cases(tiny: bool, modes: Iterable[str]) -> list[tuple[workloads.SeparableShape, str]]:
    """(shape, mode) in the order of what is worth most; the rehearsal takes every fourth."""
    training = workloads.SEPARABLE_TRAINING
    pairs = [(shape, mode) for mode in modes for shape in (workloads.SEPARABLE if mode == "eval" else training)]
    return [(workloads.tiny(shape) if tiny else shape, mode) for shape, mode in (pairs[::4] if tiny else pairs)]


def ops(log: Log, device: torch.device, tiny: bool) -> None:
    _ops(log, device, tiny, ("fastseg", "eager"))
    if device.type == "cuda":
        forms(log, device, tiny)
        _ops(log, device, tiny, ("compile",))  # minutes of compilation: after everything else


def ops_tuned(log: Log, device: torch.device, tiny: bool) -> None:
    _ops(log, device, tiny, ("fastseg",))


def _ops(log: Log, device: torch.device, tiny: bool, providers: tuple[str, ...]) -> None:
    for shape, mode in _cases(tiny, bench.MODES):
        names = {"shape": shape.name, "N": shape.N, "mode": mode}
        if log.time_left() < (20 if "compile" in providers else 3) and not tiny:
            log.left_out.append(f"{shape.name} {mode} {'/'.join(providers)}")
            continue
        problem = bench.Problem(shape, mode, device)
        networks = problem.networks()
        with problem.context():
            path = _path(problem)
            functions = {name: problem.function(networks[name]) for name in dict.fromkeys(("eager", *providers))}
            wrong = problem.disagreement(functions)
            for provider in providers:
                if wrong:
                    log.row(**names, provider=provider, wrong=wrong)
                    continue
                fn = functions[provider]
                timing = timed(fn, device, **({"graph": mode != "train-backward"} if device.type == "cuda" else {}))
                summary = harness.summary(timing, bytes_moved=problem.bytes_moved, floor_s=problem.floor_s)
                log.row(
                    **names, provider=provider, dtype=str(problem.dtype), **summary,
                    peak_mib=harness.peak_mib(fn, device), path=path,
                    configurations=_sources(provider, fn, device),
                )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.empty_cache()


def other_ops(log: Log, device: torch.device, tiny: bool) -> None:
    """Pooling, heads, upsampling, transposed convolution against their baselines."""
    op_stages.measure(log, device, tiny, timed)


def forms(log: Log, device: torch.device, tiny: bool) -> None:
    """Both forms of the inference path, timed on every shape: what the cost model that chooses is judged by."""
    for shape, mode in _cases(tiny, ("eval",)):
        if log.time_left() < 3:
            log.left_out.append(f"{shape.name} {mode} both forms")
            continue
        problem = bench.Problem(shape, mode, device)
        for form in ("fused", "split"):
            with problem.context(), bench.forced(form):
                fn = problem.function(problem.fused)
                summary = harness.summary(timed(fn, device), bytes_moved=problem.bytes_moved, floor_s=problem.floor_s)
                log.row(shape=shape.name, N=shape.N, mode=mode, provider=f"fastseg, {form}", **summary)


def _sources(provider: str, fn: Callable[[], object], device: torch.device) -> list[str]:
    return harness.config_sources(fn, device) if provider == "fastseg" else []


def _path(problem: bench.Problem) -> str:
    """Which path and form the op takes."""
    with explain() as report:
        problem.fused(problem.x)
    return "; ".join(f"{decision.path}: {decision.why}" for decision in report)


# tune: launch configurations.


def tune(log: Log, device: torch.device, tiny: bool) -> None:
    from fastseg.kernels import config, observe
    from fastseg.kernels import tune as search

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
    cases = _cases(tiny, ("eval", "train-backward"))
    if tiny:  # the interpreter takes seconds for each: one program a launch, one case a mode
        cases = [(replace(shape, H=8, W=8), mode) for shape, mode in (cases[0], cases[-1])]

    def work() -> Iterable[tuple[str, Callable[[], list]]]:
        """(label, the op calls of one workload), the separable convolution's first."""
        for shape, mode in cases:
            problem = bench.Problem(shape, mode, device)
            with problem.context():
                calls = observe.op_calls(lambda p=problem: p.function(p.fused)())
            yield f"{shape.name} {mode}", calls
        for label, function in op_stages.workloads(tiny, device) if not tiny else ():  # interpreted: minutes
            yield label, observe.op_calls(function)

    for label, calls in work():
        if log.time_left() < 3 and not tiny:
            log.left_out.append(label)
            continue
        rows = [(row, call) for row, call in observe.rows_of(calls) if row not in seen]
        seen.update(row for row, _ in rows)
        left = search.tune(rows, note, seconds=log.time_left(), **options)
        log.left_out.extend(str(row) for row in left)


# models: latency, throughput, peak memory, kernels per forward.


def models(log: Log, device: torch.device, tiny: bool) -> None:
    shapes = bench_models.SHAPES[:1] if tiny else bench_models.SHAPES
    for providers in (("fastseg", "eager"), ("compile",)):
        for shape in shapes:
            if "compile" in providers and device.type == "cpu":
                continue
            if log.time_left() < (60 if "compile" in providers else 8) and not tiny:
                log.left_out.append(f"{bench_models.label(shape)} {'/'.join(providers)}")
                continue
            _model(log, bench_models.Problem(replace(shape, H=64, W=64) if tiny else shape, device), providers)


def _model(log: Log, problem: bench_models.Problem, providers: tuple[str, ...]) -> None:
    device, images = problem.device, problem.shape.N
    with problem.context():
        functions = problem.functions()
        wrong = problem.disagreement({name: functions[name] for name in dict.fromkeys(("eager", *providers))})
        ways = {}
        for name in providers:
            ways[name, False] = functions[name]
            if device.type == "cuda":
                ways[name, True] = harness.captured(functions[name])
        samples = interleaved(ways, repetitions=3 if device.type == "cpu" else 50)
        for (name, graph), seconds in samples.items():
            row = {"shape": bench_models.label(problem.shape), "N": images, "provider": name, "cuda_graph": graph}
            if wrong:
                log.row(**row, wrong=wrong)
                continue
            summary = harness.summary(harness.Timing(seconds, "wall"))
            log.row(
                **row, dtype=str(problem.dtype), **summary, images_per_s=images / summary["median_us"] * 1e6,
                peak_mib=None if graph else harness.peak_mib(functions[name], device),
                launches=harness.launch_count(functions[name]), kernels=harness.kernel_count(functions[name], device),
            )  # fmt: skip


STAGES: dict[str, Callable[[Log, torch.device, bool], None]] = {
    "env": env, "tests": tests, "ops": ops, "other-ops": other_ops, "tune": tune, "ops-tuned": ops_tuned,
    "models": models,
}  # fmt: skip
