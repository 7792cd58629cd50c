"""What one call takes: peak memory, launches, bytes kept for a backward, arithmetic. Each is counted here alone."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fastseg.ops.core.torch_private import TorchDispatchMode, tree_leaves

Call = Callable[[], object]


class Live(TorchDispatchMode):
    """Counts inside the block: ops that write a tensor, and the bytes that their results hold.

    Attributes:
        ops: how many ops wrote a tensor.
        peak: most bytes that were held at once; each storage once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.peak = 0, 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def others(self) -> int:
        """Bytes that are held beside the tensors; a subclass may count some."""
        return 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        self.ops += not returns or any(r.alias_info is None or r.alias_info.is_write for r in returns)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, self.others() + sum(size for _, size in self._storages.values()))
        return out


def peak_mib(call: Call, device: torch.device) -> float:
    """MiB that one call allocates above what was there before, at its peak.

    On CUDA as the allocator counts. On a CPU what the results of torch's ops hold at once, which is right where the
    dispatcher sees all that runs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with Live() as counter:
        call()
    return counter.peak / 2**20


def launches(call: Call, device: torch.device) -> int:
    """Kernels, copies and fills of one call on CUDA, whoever launches them; on a CPU ops that write a tensor."""
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize(device)
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    with Live() as counter:
        call()
    return counter.ops


def kept_bytes(call: Call) -> int:
    """Bytes that autograd keeps for the backward of one call, each storage once; parameters are not counted."""
    kept: dict[int, tuple[Tensor, int]] = {}  # the tensors live on, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t if t._base is None else t._base, torch.nn.Parameter):  # nor a view of one
            kept[t.untyped_storage()._cdata] = t, t.untyped_storage().nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(size for _, size in kept.values())


class _Convolutions(TorchDispatchMode):
    """What the convolutions read and write, each once: no fusion does with less."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "convolution" in func._schema.name:
            self.bytes += sum(t.nbytes for t in (*args[:2], out) if isinstance(t, Tensor))
        return out


def work(call: Call) -> dict[str, float]:
    """``gflop``, and ``mbytes`` that the convolutions of one call move, in the dtype it runs in."""
    with torch.no_grad(), _Convolutions() as moved, FlopCounterMode(display=False) as flops:
        call()
    return {"gflop": flops.get_total_flops() * 1e-9, "mbytes": moved.bytes * 1e-6}


class _Executed(TorchDispatchMode):
    """What torch's operators multiply, and read and write, views aside: a tensor once for each operator that has it.

    ``FlopCounterMode`` hooks all modules, so that fastseg would run them one by one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if func.namespace == "aten" and packet not in flop_registry:  # addmm_ is as addmm
            packet = getattr(torch.ops.aten, func._schema.name.partition("::")[2].rstrip("_"), packet)
        if packet in flop_registry:
            self.products += flop_registry[packet](*args, **kwargs, out_val=out) // 2
        if not func.is_view:
            tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
            self.bytes += sum(t.nbytes for t in tensors.values())
        return out


def products_and_bytes(call: Call) -> tuple[int, int]:
    """Multiplications of the convolutions and matrix products of one call, and the bytes that its operators move."""
    with torch.no_grad(), _Executed() as executed:
        call()
    return executed.products, executed.bytes
