"""cuDNN's fused call gets its own output, uninitialised, as an addend times 0: what the memory held must not matter."""

import pytest
import torch
from torch.nn import functional as F

import fastseg
from fastseg.ops.conv_act import conv2d_act

pytestmark = pytest.mark.gpu
STALE = {
    "NaN": lambda nbytes, dtype: torch.full((nbytes // dtype.itemsize,), torch.nan, device="cuda", dtype=dtype),
    "labels of 255": lambda nbytes, dtype: torch.full((nbytes,), 255, device="cuda", dtype=torch.uint8),
    "int64 of -1": lambda nbytes, dtype: torch.full((nbytes // 8,), -1, device="cuda"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("stale", STALE)
@pytest.mark.parametrize("skip", [False, True], ids=["", "residual"])
@fastseg.force("conv2d_act", "cudnn")  # at 1x1 too
def test_what_the_memory_held(dtype, K, stale, skip, device):
    draw = lambda *size: torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x, weight = draw(2, 64, 64, 96), draw(128, 64, K, K).div_(8 * K)
    bias, residual = torch.randn(128, device=device, dtype=dtype), draw(2, 128, 64, 96) if skip else None
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=K // 2)
    want = F.relu(want + residual.double() if skip else want)
    nbytes = want.numel() * dtype.itemsize
    call = lambda: conv2d_act(x, weight, bias, "relu", (1, 1), (K // 2,) * 2, (1, 1), 1, residual=residual)
    torch.use_deterministic_algorithms(False)  # else torch itself fills new memory
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False), fastseg.explain() as report:
        call()  # finds its algorithm and its workspace
        torch.cuda.synchronize()
        blocks = [STALE[stale](nbytes, dtype) for _ in range(4)]
        held = {block.data_ptr() for block in blocks}
        del blocks
        y = call()
    path = report[-1].path
    assert y.data_ptr() in held, f"{path}: the output lies in other memory, nothing was tested"
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance, msg=lambda text: f"{path}: {text}")
