"""A package runs in a C++ program of some lines, without Python."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastseg.exporting import export
from fastseg.ops.core.torch_private import aoti_compiler

SOURCE = Path(__file__).parents[2] / "examples" / "run_a_package.cpp"


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None or aoti_compiler() is None, reason="needs g++ and AOTInductor")
def test_a_program_without_python_gives_the_classes(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval(), torch.randn(1, 3, 20, 24)
    export(net, tmp_path / "net.pt2", example=x, output="classes")
    home, program = Path(torch.__path__[0]), tmp_path / "run_a_package"
    includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    links = [f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-std=c++20", "-O1", *includes, str(SOURCE), "-o", str(program), *links], check=True)
    call = [str(program), str(tmp_path / "net.pt2"), "1", "3", "20", "24"]
    run = lambda words, data: subprocess.run(words, input=data, capture_output=True)
    done = run(call, x.numpy().tobytes())
    assert done.returncode == 0, done.stderr.decode()
    with torch.no_grad():
        want = torch.nn.functional.interpolate(net(x), x.shape[2:], mode="bilinear").argmax(1)
    got = np.frombuffer(done.stdout, np.uint8)
    assert got.size == want.numel() and (got != want.flatten().numpy()).mean() < 5e-3
    assert run(call, b"").returncode == 1 and run(call[:2], b"").returncode == 2
    assert run([call[0], str(tmp_path / "none.pt2"), *call[2:]], x.numpy().tobytes()).returncode == 1
