"""Kernels compiled before they are launched: what is noted of a launch, and a cache that moves."""

import json

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.gpu import warm_cache
from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.tools import precompile
from fastseg.kernels.tools.precompile import Pointer, signature


@triton.jit
def _kernel(x_ptr, n, scale, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, mask=i < n) * scale, mask=i < n)


def _signature(x, n, scale=0.5, **kwargs):
    return signature(_kernel, (x, n, scale), {"BLOCK": 16, "num_warps": 4, **kwargs})


def test_what_a_signature_tells_apart():
    x = torch.zeros(64)
    one = _signature(x, 48)
    assert one.args == (Pointer(torch.float32, True), 16, 0.5)
    assert one.kwargs == (("BLOCK", 16), ("num_warps", 4))
    assert _signature(torch.zeros(8), 160).key == one.key  # another size, the same code
    others = [
        _signature(x[1:], 48), _signature(x.half(), 48), _signature(x, 47), _signature(x, 1), _signature(x, 2**35),
        _signature(x, 48, BLOCK=32), _signature(x, 48, num_warps=8), _signature(x, 48, scale=1),
    ]  # fmt: skip
    assert len({other.key for other in (*others, one)}) == 9
    assert _signature(x, 2**31 - 1).args[1] < 2**31 <= _signature(x, 2**31).args[1]


def test_launches_are_noted_and_not_made(tmp_path):
    x = torch.ones(16)
    with precompile.collected() as found:
        for n in (16, 32, 5):
            launch(_kernel, (1,), x, n, 2.0, BLOCK=16)
    assert len(found) == 2
    assert x.eq(1).all()
    path = tmp_path / "signatures.pickle"
    precompile.write(path, list(found.values())[:1])
    precompile.write(path, found.values())
    assert [one.key for one in precompile.read(path)] == list(found)


def test_a_stand_in_is_specialised_as_what_it_stands_for():
    for x in (torch.zeros(8), torch.zeros(8)[1:], torch.zeros(8, dtype=torch.int64)):
        described = precompile.described(x, False)
        assert precompile.described(precompile.stand_in(described), False) == described
    pair = (torch.zeros(8), torch.zeros(8)[1:])
    assert precompile.described(pair, False) == (Pointer(torch.float32, True), Pointer(torch.float32, False))


def _cache(folder, kernels):
    for name, sizes in kernels.items():
        (folder / name).mkdir(parents=True)
        for ext, size in sizes.items():
            (folder / name / f"k.{ext}").write_bytes(b"0" * size)
        children = {f"k.{ext}": f"/elsewhere/{name}/k.{ext}" for ext in sizes}
        (folder / name / "__grp__k.json").write_text(json.dumps({"child_paths": children}))


def test_a_cache_that_moved_is_found_by_triton(tmp_path, monkeypatch):
    from triton.runtime.cache import FileCacheManager

    _cache(tmp_path, {"ABC": {"json": 5, "cubin": 9}})
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    manager = FileCacheManager("ABC")
    assert not manager.get_group("k.json")  # Triton keeps absolute paths; 3.9 gives None where 3.7 gives an empty one
    assert warm_cache.adopt(tmp_path) == 1
    assert manager.get_group("k.json") == {name: str(tmp_path / "ABC" / name) for name in ("k.json", "k.cubin")}


def test_what_a_launch_does_not_need_is_left_out(tmp_path):
    _cache(tmp_path, {"A": {"json": 5, "cubin": 900, "ttir": 9999}, "B": {"json": 5, "cubin": 2000}})
    (tmp_path / "signatures.pickle").write_bytes(b"0" * 100)
    size = warm_cache.prune(tmp_path, limit=2000)
    assert sorted(f.name for f in (tmp_path / "A").iterdir()) == ["__grp__k.json", "k.cubin", "k.json"]
    assert not (tmp_path / "B").exists()
    assert size == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) < 2000
    assert list(json.loads((tmp_path / "A" / "__grp__k.json").read_text())["child_paths"]) == ["k.json", "k.cubin"]


def test_an_interpreted_kernel_is_not_compiled():
    if precompile.JITFunction is type(_kernel):
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=0"):
        precompile.compile_signature(_signature(torch.zeros(8), 8)._replace(module=__name__))
