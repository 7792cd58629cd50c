"""torch's own sample inputs, as installed: the outside judge. Private API: how many there are is the version's."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch_tests  # noqa: F401  # a stand-in for expecttest
from torch import Tensor

with mock.patch.object(torch.backends, "disable_global_flags"):  # the import would freeze them for the whole process
    from torch.testing._internal.common_methods_invocations import op_db


def op_info(name: str, variant: str = ""):
    """The entry of ``torch.nn.functional.<name>``."""
    found = [o for o in op_db if o.name == f"nn.functional.{name}" and o.variant_test_name == variant]
    assert len(found) == 1, f"{name} {variant}: {len(found)} entries in op_db"
    return found[0]


def samples(name: str, variant: str = "", *, dtype=torch.float64, requires_grad: bool = False, device="cpu") -> list:
    """Its sample inputs."""
    with contextlib.ExitStack() as stack:
        # torch seeds anew for each of them, and keeps a formatted stack for every kind of device that it does not have
        for module in (torch.cuda, torch.xpu, torch.mtia) if device == "cpu" else ():
            stack.enter_context(mock.patch.object(module, "manual_seed_all"))
        return list(op_info(name, variant).sample_inputs(device, dtype, requires_grad=requires_grad))


def error_inputs(name: str) -> list:
    """Inputs that must raise, with the error's type and text."""
    return list(op_info(name).error_inputs("cpu"))


def layouts(x: Tensor) -> Iterator[Tensor]:
    """``x`` as it is, channels_last, as a slice of a larger map, and transposed in memory."""
    yield x
    if x.dim() in (4, 5):
        yield x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    yield torch.stack([x, x + 1], -1)[..., 0]
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)


def same_bits(got: Tensor, want: Tensor) -> None:
    """Equal in dtype, shape, strides and every bit; NaN equals NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape, (got.dtype, got.shape, want.dtype, want.shape)
    significant = [d for d in range(want.dim()) if want.shape[d] > 1 and want.numel()]
    assert [got.stride(d) for d in significant] == [want.stride(d) for d in significant], (got.stride(), want.stride())
    assert torch.equal(torch.nan_to_num(got, 7.25) if got.is_floating_point() else got,
                       torch.nan_to_num(want, 7.25) if want.is_floating_point() else want), (got, want)  # fmt: skip
    if got.is_floating_point():
        assert torch.equal(torch.signbit(got), torch.signbit(want)), "a zero has the other sign"
