"""What chips can do: bandwidth, lanes, matrix units, the cost of a launch."""

import torch

# An H200's ceilings in operations or bytes per second, for every GPU: only their ratios decide.
BANDWIDTH = 4.3e12


LANES = 33.4e12
DOT = {torch.float16: 790e12, torch.bfloat16: 790e12, torch.float32: 395e12, torch.float64: 67e12}
OWN_GEMM = 0.85  # of a library's rate: an estimate, to be measured
OWN_LANES = 0.5  # the same of fp32 without tf32, whose operands go through registers: another
MULTIPROCESSORS = 132
LAUNCH = 2e-6  # seconds between two kernels of a CUDA graph: an estimate, to be measured
