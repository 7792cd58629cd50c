"""Which configuration a launch gets, and what the launch guard lets through, on made-up GPUs."""

import json
import warnings

import pytest
import torch
import triton

from fastseg.kernels.runtime import config
from fastseg.kernels.runtime.launch import intercept, run
from fastseg.kernels.runtime.launch import launch as launch_kernel

CUDA = torch.device("cuda", 0)
OTHER = torch.device("cuda", 1)
KEY = {"C": 32, "dtype": torch.bfloat16}
DEFAULT = {"BLOCK": 64, "num_warps": 4}


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    """Two GPUs, empty table folders, and one kernel "toy" with a heuristic and candidates."""
    monkeypatch.setattr(config, "USER", tmp_path / "user")
    monkeypatch.setattr(config, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda index: ["NVIDIA H200 NVL", "NVIDIA A100-SXM4-80GB"][index]
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 0)][index])
    monkeypatch.setattr(config, "_heuristics", {"toy": lambda size, C, dtype: dict(DEFAULT)})
    monkeypatch.setattr(config, "_candidates", {})
    _forget()
    yield
    _forget()


def _forget():
    config.forget_tables()
    config.table_names.cache_clear()


def _write(
    folder: str, name: str, sizes: object, *, triton_version: str = triton.__version__, row: str = "C=32,dtype=bf16"
):
    path = getattr(config, folder) / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"triton": triton_version, "configs": {"toy": {row: sizes}}}))
    _forget()
    return path


def _row(block: int) -> dict[str, int]:
    return {"BLOCK": block, "num_warps": 8}


def _block(size: int = 1000, device: torch.device = CUDA, **key) -> int:
    return config.select("toy", size=size, device=device, **{**KEY, **key}).BLOCK


def test_heuristic_where_nothing_else_is():
    cfg = config.select("toy", size=1000, device=CUDA, **KEY)
    assert cfg.launch == {**DEFAULT, "enable_fp_fusion": True}
    assert cfg.source == "heuristic"
    assert (cfg.BLOCK, cfg.num_warps) == (64, 4)
    with pytest.raises(AttributeError, match="BLOCK_M"):
        cfg.BLOCK_M  # noqa: B018


def test_override_then_user_then_shipped_then_heuristic():
    assert _block() == 64
    _write("SHIPPED", "sm_90", {"1000": _row(1)})
    assert _block() == 1
    _write("SHIPPED", "NVIDIA_H200", {"1000": _row(2)})
    assert _block() == 2
    _write("USER", "sm_90", {"1000": _row(4)})
    assert _block() == 4
    path = _write("USER", "NVIDIA_H200", {"1000": _row(8)})
    assert config.select("toy", size=1000, device=CUDA, **KEY).source == str(path)
    assert _block() == 8
    with config.override("toy", BLOCK=16):
        assert _block() == 16
    assert _block() == 8


def test_override_keeps_the_heuristics_other_values_and_nests():
    _write("USER", "NVIDIA_H200", {"1000": _row(8)})
    with config.override("toy", num_warps=1):
        cfg = config.select("toy", size=1000, device=CUDA, **KEY)
        assert (cfg.BLOCK, cfg.num_warps, cfg.source) == (64, 1, "override")
        with pytest.raises(RuntimeError, match="inner"), config.override("toy", BLOCK=2):
            assert _block() == 2
            raise RuntimeError("inner")
        assert config.select("toy", size=1000, device=CUDA, **KEY).num_warps == 1
    with pytest.raises(KeyError, match=r"'tyo'.*toy"), config.override("tyo", BLOCK=1):
        pass


def test_a_cpu_tensor_never_gets_a_gpus_row():
    _write("USER", "NVIDIA_H200", {"1000": _row(8)})
    assert _block(device=torch.device("cpu")) == 64


def test_nearest_size_is_in_log():
    _write("SHIPPED", "NVIDIA_H200", {"100": _row(1), "10000": _row(2)})
    assert _block(999) == 1  # nearer to 10000 than to 100 by difference from 5050 on, by ratio from 1000 on
    assert _block(1001) == 2
    assert (_block(1), _block(10**12)) == (1, 2)
    assert _block(0) == 1  # log(0) is not taken


def test_a_tie_takes_the_smaller_size():
    for sizes in ({"100": _row(1), "10000": _row(2)}, {"10000": _row(2), "100": _row(1)}):
        _write("SHIPPED", "NVIDIA_H200", sizes)
        assert _block(1000) == 1


def _predict(block: int, *, triton_version: str = triton.__version__, measured: dict | None = None):
    path = _write("SHIPPED", "NVIDIA_H200", {})
    parts = {"configs": {"toy": {"C=32,dtype=bf16": measured}} if measured else {},
             "predicted": {"toy": {"C=32,dtype=bf16": {"1000": _row(block)}}}}  # fmt: skip
    path.write_text(json.dumps({"triton": triton_version, **parts}))
    _forget()


def test_what_was_measured_wins_over_what_was_predicted():
    _predict(16)
    cfg = config.select("toy", size=1000, device=CUDA, **KEY)
    assert (cfg.BLOCK, cfg.source) == (16, "predicted")
    _predict(16, measured={"100000": _row(2)})
    assert _block() == 2
    _predict(16)
    _write("USER", "sm_90", {"1": _row(4)})
    assert _block() == 4


def test_a_prediction_counts_from_half_to_twice_its_size():
    _predict(16)
    assert [_block(size) for size in (499, 500, 2000, 2001)] == [64, 16, 16, 64]


def test_a_prediction_of_another_tritons_code_is_left_out_in_silence():
    _predict(16, triton_version="2.1.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _block() == 64


def test_rows_are_picked_by_the_whole_key():
    _write("SHIPPED", "NVIDIA_H200", {"1000": _row(1)})
    assert _block(C=33) == 64
    assert _block(dtype=torch.float16) == 64
    assert config.row_name(dtype=torch.bfloat16, C=32, K=3) == "C=32,K=3,dtype=bf16"


def test_two_gpus_have_their_own_tables(monkeypatch):
    _write("SHIPPED", "NVIDIA_H200", {"1000": _row(1)})
    _write("SHIPPED", "NVIDIA_A100-SXM4-80GB", {"1000": _row(2)})
    assert (_block(device=CUDA), _block(device=OTHER), _block(device=CUDA)) == (1, 2, 1)
    assert config.gpu_name(0) == "NVIDIA_H200"  # the H200 family shares one
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200 MIG 1g.18gb")
    assert config.gpu_name(0) == "NVIDIA_H200_MIG_1g.18gb"  # a seventh of its multiprocessors


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"triton": "TRITON", "configs": 3}',
        '{"triton": "TRITON", "configs": {"toy": {"C=32,dtype=bf16": {"big": {"BLOCK": 1}}}}}',
        '{"triton": "TRITON", "configs": {"toy": {"C=32,dtype=bf16": {"1000": {"BLOCK": "__import__(\'os\')"}}}}}',
        '{"triton": "TRITON", "configs": {"toy": {"C=32,dtype=bf16": {"1000": {"BLOCK": true}}}}}',
        '{"triton": "TRITON", "configs": {"toy": {"C=32,dtype=bf16": {"1000": {"BLOCK": 0}}}}}',
        '{"triton": "TRITON", "configs": {"toy": {"C=32,dtype=bf16": {"1000": {}}}}}',
    ],
)
def test_a_broken_file_is_left_out_with_one_warning(text):
    path = _write("USER", "NVIDIA_H200", {})
    path.write_text(text.replace("TRITON", triton.__version__))
    _write("SHIPPED", "NVIDIA_H200", {"1000": _row(2)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [_block(size) for size in (1000, 1001, 1002)] == [2, 2, 2]
    assert [str(w.message) for w in caught if str(path) in str(w.message)] == [str(w.message) for w in caught]
    assert len(caught) == 1


@pytest.mark.parametrize(
    "values", [{"BLOCK": 1, "num_warps": 4, "BLOCK_Z": 2}, {"BLOCK": 1}], ids=["unknown", "missing"]
)
def test_a_row_of_other_fields_is_left_out_with_one_warning(values):
    _write("USER", "NVIDIA_H200", {"1000": values})
    with pytest.warns(UserWarning, match="toy has") as caught:
        assert [_block() for _ in range(3)] == [64, 64, 64]
    assert len(caught) == 1


def test_a_table_of_another_triton_minor_is_used_with_one_warning():
    path = _write("SHIPPED", "NVIDIA_H200", {"1000": _row(2)}, triton_version="2.1.0")
    with pytest.warns(UserWarning, match="2.1.0") as caught:
        assert [_block(size) for size in (1000, 1001)] == [2, 2]
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)


def test_a_table_of_another_patch_version_is_used_silently():
    minor = ".".join(triton.__version__.split(".")[:2])
    _write("SHIPPED", "NVIDIA_H200", {"1000": _row(2)}, triton_version=f"{minor}.99")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _block() == 2


def test_tables_are_read_once_until_forgotten():
    path = _write("SHIPPED", "NVIDIA_H200", {"1000": _row(2)})
    assert _block() == 2
    path.unlink()
    assert (_block(), _block(77)) == (2, 2)
    config.forget_tables()
    assert _block() == 64


def test_candidates_start_with_the_heuristic_and_hold_no_duplicate():
    config.candidates("toy")(lambda size, C, dtype: [_row(16), dict(DEFAULT), _row(16), _row(C)])
    assert config.candidates_of("toy", 1000, **KEY) == [DEFAULT, _row(16), _row(32)]
    assert config.kernels() == ["toy"]
    config.heuristic("other")(lambda size: {"BLOCK": 1})
    assert config.candidates_of("other", 5) == [{"BLOCK": 1}]
    assert config.kernels() == ["other", "toy"]


def test_observers_see_every_question():
    seen = []
    with config.observe_selects(lambda kernel, size, key: seen.append((kernel, size, key))):
        _block(5)
        with config.override("toy", BLOCK=1):
            _block(6)
    _block(7)
    assert seen == [("toy", 5, KEY), ("toy", 6, KEY)]


# The launch guard. A kernel is anything that `kernel[grid](*args, **kwargs)` works on.


class Kernel:
    """Notes grid, arguments and the device that is current when it is launched."""

    def __init__(self):
        self.launches = []
        self.current = None

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((grid, args, kwargs, self.current))


def test_a_launch_enters_the_tensors_device(monkeypatch):
    kernel = Kernel()

    class Entered:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            kernel.current = self.device

        def __exit__(self, *exc):
            kernel.current = None

    class OnDevice(torch.Tensor):
        device = OTHER

    x = torch.ones(2).as_subclass(OnDevice)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    launch_kernel(kernel, (3,), 7, x, BLOCK=4)
    grid, args, kwargs, device = kernel.launches[0]
    assert (grid, args[0], kwargs, device) == ((3,), 7, {"BLOCK": 4}, OTHER)
    assert kernel.current is None


def test_a_launch_on_the_cpu_enters_no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.fail(f"entered {device}"))
    kernel = Kernel()
    launch_kernel(kernel, (1,), torch.ones(1))
    assert len(kernel.launches) == 1


def test_mixed_devices_are_refused():
    kernel = Kernel()
    with pytest.raises(AssertionError, match="tensors on cpu and meta"):
        launch_kernel(kernel, (1,), torch.ones(1), 3, torch.ones(1, device="meta"))
    assert kernel.launches == []


@pytest.mark.parametrize("grid", [(2**31,), (2**20, 2**11), (1, 65536), (1, 1, 65536)], ids=str)
def test_grids_past_the_limits_are_refused(grid):
    kernel = Kernel()
    with pytest.raises(AssertionError, match=r"grid \(.*limits"):
        launch_kernel(kernel, grid, torch.ones(1))
    assert kernel.launches == []


@pytest.mark.parametrize("grid", [(2**31 - 1,), (1, 65535), (1, 1, 65535)], ids=str)
def test_grids_at_the_limits_pass(grid):
    kernel = Kernel()
    launch_kernel(kernel, grid, torch.ones(1))
    assert kernel.launches[0][0] == grid


def test_intercept_stands_in_for_the_launch_and_may_run_it():
    kernel, seen = Kernel(), []
    x = torch.ones(1)
    with intercept(lambda *launch: seen.append(launch)):
        launch_kernel(kernel, (1,), x, BLOCK=2)
        with pytest.raises(AssertionError, match="limits"):
            launch_kernel(kernel, (1, 65536), x)
        with intercept(run):
            launch_kernel(kernel, (2,), x)
        launch_kernel(kernel, (3,), x)
    launch_kernel(kernel, (4,), x)
    assert [(launch[1], launch[3]) for launch in seen] == [((1,), {"BLOCK": 2}), ((3,), {})]
    assert [launch[0] for launch in kernel.launches] == [(2,), (4,)]


def test_a_user_without_a_home(monkeypatch):
    """As in containers that run under a number of their own: nothing is found there, and nothing can be made."""

    def nobody(cls):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", classmethod(nobody))
    folder = config.home() / ".cache" / "fastseg" / "tuned"
    assert not (folder / "sm_90.json").is_file()
    with pytest.raises(OSError):
        folder.mkdir(parents=True)
