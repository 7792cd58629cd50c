"""The stages of ``gpu.py``: each measures one thing in a process of its own and notes rows as it goes.

A stage is ``f(log, device, tiny)``. It asks ``log.time_left()`` before each piece of work, the most valuable first, and
names in ``log.left_out`` what there was no time for. What raises becomes a row with an ``error``, and the stage goes
on; it ends only where the device answers no more. ``tiny`` is the rehearsal: small shapes, any device.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial

import torch

import fastseg
from benchmarks import bench_models, harness, workloads
from benchmarks import bench_separable_conv as bench
from benchmarks.gpu import gpu_tests, predicted, warm_cache
from benchmarks.gpu.ops import cases
from benchmarks.harness import isolated, settle
from benchmarks.problem import Case, Problem
from benchmarks.report.record import Log
from benchmarks.roofline.floors import find_device
from fastseg.inference.graphs import captured
from fastseg.measure.timing import interleaved
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.explain import explain

AHEAD = 3  # cases whose candidates compile while another is timed
Rows = list[tuple[object, Callable[[], object]]]  # of `watch.rows_of`


def timed(fn: Callable[[], object], device: torch.device, **options) -> harness.Timing:
    """Device times on CUDA, wall-clock on a CPU."""
    if device.type == "cuda":
        return harness.device_times(fn, **options)
    return harness.Timing(interleaved({"fn": fn}, repetitions=3, warmup=1)["fn"], "wall")


# env: what the machine can do, and what performance.md wants to know first.


def env(log: Log, device: torch.device, tiny: bool) -> None:
    dtype = harness.dtype_for(device)
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *size: torch.empty(size, device=device, dtype=dtype).normal_(generator=generator)  # zeros run faster
    with isolated(log, device, what="copy"):
        a = draw(2**20 if tiny else 2**30)
        b = torch.empty_like(a)
        copied = 2 * a.numel() * a.element_size()
        log.row(what="copy", **harness.summary(timed(partial(b.copy_, a), device), bytes_moved=copied))
        del a, b

    n = 256 if tiny else 8192
    with isolated(log, device, what=f"GEMM {n}^3"):
        summary = harness.summary(timed(partial(torch.mm, draw(n, n), draw(n, n)), device))
        log.row(what=f"GEMM {n}^3", **summary, tflop_per_s=2 * n**3 / summary["median_us"] * 1e-6)

    with isolated(log, device, what="host and graph overheads"):
        for name, microseconds in _overheads(device).items():
            log.row(what=name, median_us=microseconds)

    for shape in workloads.SEPARABLE:
        if log.time_left() < 2:
            log.left_out.append(f"eager depthwise {shape.name}")
            continue
        with isolated(log, device, what="eager depthwise, channels_last", shape=shape.name):
            _depthwise(log, bench.Problem(workloads.tiny(shape) if tiny else shape, "eval", device), shape.name)


def _depthwise(log: Log, problem: bench.Problem, name: str) -> None:
    moved = (problem.shape.inputs + problem.shape.hidden) * problem.dtype.itemsize
    with problem.context():
        depthwise = partial(problem.fused.depthwise, problem.x)
        row = harness.summary(timed(depthwise, problem.device), bytes_moved=moved)
    log.row(what="eager depthwise, channels_last", shape=name, **row)


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


# gpu-tests, tests: the kernels compiled for real. Times on red tests do not count.


def tests(log: Log, device: torch.device, tiny: bool, expression: str = "not gpu") -> None:
    workers = 1 if tiny else gpu_tests.SIDE_BY_SIDE[expression]
    gpu_tests.run(log, expression, gpu_tests.FOLDERS, workers, skips_pass=device.type != "cuda")


# ops, ops-tuned: every op against its baselines.


def ops(log: Log, device: torch.device, tiny: bool) -> None:
    _ops(log, device, tiny, lambda name: "compile" not in name)


def ops_compiled(log: Log, device: torch.device, tiny: bool) -> None:
    if device.type == "cuda":  # a CPU would need minutes a case
        _ops(log, device, tiny, lambda name: "compile" in name, seconds=20)


def ops_tuned(log: Log, device: torch.device, tiny: bool) -> None:
    from fastseg.kernels.runtime import config

    config.USER = log.tuned  # asked before the shipped tables
    config.forget_tables()
    _ops(log, device, tiny, lambda name: name.startswith("fastseg"))


def _ops(log: Log, device: torch.device, tiny: bool, chosen: Callable[[str], bool], seconds: float = 3) -> None:
    for case in cases(tiny):
        if log.time_left() < seconds and not tiny:
            log.left_out.append(f"{case.op} {case.shape} {case.mode}")
            continue
        with isolated(log, device, **_names(case)):
            _op(log, device, case, chosen)


def _names(case: Case) -> dict[str, object]:
    return {"op": case.op, "shape": case.shape, "N": case.N, "mode": case.mode}


def _op(log: Log, device: torch.device, case: Case, chosen: Callable[[str], bool]) -> None:
    """The chosen providers of a case together; where one raises, those without a row again, each by itself."""
    problem = case.build(device)
    left = list(filter(chosen, problem.providers()))
    try:
        _providers(log, problem, case, left)
    except Exception:
        settle(device)
        if len(left) < 2:
            raise
        for provider in list(left):
            with isolated(log, device, **_names(case), provider=provider):
                _providers(log, problem, case, [provider])


def _providers(log: Log, problem: Problem, case: Case, left: list[str]) -> None:
    """Time providers that compute the same; each that has its row is taken from ``left``."""
    device = problem.device
    with problem.context():
        functions = problem.functions(*left)
        wrong = problem.disagreement(functions)
        for provider in list(left):
            names = {**_names(case), "provider": provider}
            if wrong:
                log.row(**names, wrong=wrong)
            elif provider in functions:
                fn = functions[provider]
                timing = timed(fn, device, **({"graph": not problem.backward} if device.type == "cuda" else {}))
                summary = harness.summary(timing, bytes_moved=problem.bytes_moved, floor_s=case.floor_s(device))
                log.row(
                    **names, dtype=str(problem.dtype), **summary, peak_mib=harness.peak_mib(fn, device),
                    configurations=_sources(provider, fn, device), path=_path(problem, provider),
                    **(_beside(case, device, summary["median_us"]) if provider == "fastseg" else {}),
                    **problem.notes(provider),
                )  # fmt: skip
            left.remove(provider)


def _beside(case: Case, device: torch.device, us: float) -> dict[str, float]:
    """What the static model says of the case on this chip, and the ratio."""
    chip = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return predicted.beside(case, chip and chip.name, us)


def forms(log: Log, device: torch.device, tiny: bool) -> None:
    """Both forms of the inference path, timed on every shape: what the cost model that chooses is judged by."""
    if device.type != "cuda" and not INTERPRETED:
        return  # there, the op has one form
    wanted = [case for case in bench.cases("tiny" if tiny else "full") if case.mode == "eval"]
    for case in wanted[:1] if tiny else wanted:
        if log.time_left() < 3 and not tiny:
            log.left_out.append(f"{case.shape} {case.mode} both forms")
            continue
        with isolated(log, device, **_names(case)):
            problem = case.build(device)
            for form in ("fused", "split"):
                with isolated(log, device, **_names(case), provider=f"fastseg, {form}"):
                    _form(log, problem, case, form)


def _form(log: Log, problem: bench.Problem, case: Case, form: str) -> None:
    with problem.context(), fastseg.force("separable_conv2d", form):
        fn = problem.function(problem.fused)
        timing = timed(fn, problem.device)
        summary = harness.summary(timing, bytes_moved=problem.bytes_moved, floor_s=case.floor_s(problem.device))
        log.row(**_names(case), provider=f"fastseg, {form}", **summary)


def _sources(provider: str, fn: Callable[[], object], device: torch.device) -> list[str]:
    return harness.config_sources(fn, device) if provider.startswith("fastseg") else []


def _path(problem: Problem, provider: str) -> str:
    """Which path and form our op takes; what a baseline takes is its name."""
    if not provider.startswith("fastseg"):
        return ""
    with explain() as report:
        problem.functions(provider)[provider]()
    return "; ".join(f"{decision.path}: {decision.why}" for decision in report) or "torch: no kernel of its own"


# tune: launch configurations.


def tune(log: Log, device: torch.device, tiny: bool) -> None:
    from triton.runtime import driver

    from fastseg.kernels.runtime import config
    from fastseg.kernels.tools import tune as search
    from fastseg.kernels.tools import watch as observe
    from fastseg.kernels.tools.precompile import Compiler

    name = config.gpu_name(device.index) if device.type == "cuda" else "cpu"
    path = log.tuned / f"{name}.json"
    options = {} if device.type == "cuda" else {"timer": search.wall_us}
    compiler = Compiler(driver.active.get_current_target()) if device.type == "cuda" else None

    def note(row: observe.Row, trials: list[search.Trial]) -> None:
        chosen = search.best(trials)
        if chosen is not None:
            search.write_table(path, search.entry(row, chosen), gpu=name)
        log.row(
            row=str(row), tried=len(trials), heuristic_us=trials[0].us, best_us=chosen and chosen.us,
            best=chosen and chosen.values, rejected=[f"{t.values}: {t.note}" for t in trials if t.note],
        )  # fmt: skip

    def tune_rows(rows: Rows, compiling: Sequence[Future]) -> None:
        wait(compiling, timeout=max(log.time_left(), 0))
        for row, call in rows:
            with isolated(log, device, row=str(row)):
                log.left_out.extend(map(str, search.tune([(row, call)], note, seconds=log.time_left(), **options)))

    seen: set[observe.Row] = set()
    wanted = cases(tiny, lambda case: case.mode == "eval" if tiny else case.mode != "train-forward")
    ahead: deque[tuple[Rows, list[Future]]] = deque()  # while one case is timed, the next ones' candidates compile
    try:
        for case in wanted[:1] if tiny else wanted:  # interpreted, each takes a minute
            if log.time_left() < 3 and not tiny:
                log.left_out.append(f"{case.op} {case.shape} {case.mode}")
                continue
            with isolated(log, device, **_names(case)):
                rows = [(row, call) for row, call in _rows(case, device) if row not in seen]
                seen.update(row for row, _ in rows)
                ahead.append((rows, _candidates(compiler, rows)))
            if len(ahead) > AHEAD:
                tune_rows(*ahead.popleft())
        while ahead:
            tune_rows(*ahead.popleft())
    finally:
        if compiler is not None:
            compiler.close()


def _rows(case: Case, device: torch.device) -> Rows:
    from fastseg.kernels.tools import watch

    problem = case.build(device)
    with problem.context():
        return watch.rows_of(watch.op_calls(lambda: problem.functions("fastseg")["fastseg"]()))


def _candidates(compiler, rows: Rows) -> list[Future]:
    """Have every candidate of the rows compiled, all at once."""
    from fastseg.kernels.runtime import config
    from fastseg.kernels.tools.precompile import signature
    from fastseg.kernels.tools.watch import planned

    futures = []
    for row, call in rows if compiler is not None else ():
        for values in config.candidates_of(row.kernel, row.size, **dict(row.key)):
            with config.override(row.kernel, **values):
                launches = planned(call, row)
            futures += [compiler.submit(signature(kernel, args, kwargs)) for kernel, _, args, kwargs in launches]
    return futures


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
                with isolated(log, device, shape=bench_models.label(shape), mode=mode, provider="/".join(providers)):
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
    "compile": warm_cache.stage, "gpu-tests": partial(tests, expression="gpu"), "env": env, "forms": forms,
    "tests": tests, "ops": ops, "tune": tune, "ops-tuned": ops_tuned, "models": models, "ops-compiled": ops_compiled,
}  # fmt: skip
