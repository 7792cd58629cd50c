"""The ``run`` fixture: device times on CUDA, wall-clock on a CPU, both in pytest-benchmark's own statistics."""

from collections.abc import Callable

import pytest
import torch

from benchmarks import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all shapes; without it a CPU gets the small ones")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("benchmark_disable") and not config.getoption("--full"):
        again = [item for item in items if item.get_closest_marker("same_when_tiny")]
        items[:] = [item for item in items if not item.get_closest_marker("same_when_tiny")]
        config.hook.pytest_deselected(items=again)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.update(harness.machine(harness.here()))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return harness.here()


@pytest.fixture
def size(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Which shapes to run: "full" on a GPU, "small" (one image) on a CPU, "tiny" in a smoke test."""
    if request.config.getoption("benchmark_disable"):
        return "tiny"
    return "full" if device.type == "cuda" or request.config.getoption("--full") else "small"


@pytest.fixture
def run(benchmark, device: torch.device) -> Callable:
    """``run(fn, bytes_moved=..., floor_s=..., **info)`` times ``fn`` and notes what the time depends on.

    Args of ``run``:
        fn: the call to time.
        bytes_moved: what it must move, for GB/s; None where that says nothing.
        floor_s: seconds at the device's ceilings, for the share of the roofline.
        graph: whether a short ``fn`` may be timed as a CUDA graph.
        info: shape, dtype, provider and whatever else the row should say.
    """

    def time_and_note(
        fn: Callable[[], object],
        *,
        bytes_moved: float | None = None,
        floor_s: float | None = None,
        graph: bool = True,
        **info: object,
    ) -> None:
        benchmark.extra_info.update(info, device=device.type, **harness.machine(device))
        if benchmark.disabled:
            benchmark(fn)
            return
        if device.type == "cuda":
            timing = harness.device_times(fn, graph=graph)
            feed(benchmark, timing.seconds)
        else:
            benchmark.pedantic(fn, rounds=3, warmup_rounds=1)
            timing = harness.Timing(list(benchmark.stats.stats.data), "wall")
        summary = harness.summary(timing, bytes_moved=bytes_moved, floor_s=floor_s)
        benchmark.extra_info.update(
            summary, peak_mib=harness.peak_mib(fn, device), configurations=harness.config_sources(fn, device)
        )

    return time_and_note


def feed(benchmark, seconds: list[float]) -> None:
    """Put times taken elsewhere into the plugin's statistics: ``--benchmark-json``, compare and groups keep working.

    Private API of pytest-benchmark (5.x), which knows no source of times but its own; a test pins it.
    """
    benchmark._mode = "device times"
    stats = benchmark._make_stats(1)
    for value in seconds:
        stats.update(value)
