"""A time for a launch without a GPU: a static model over the compiled code. Nothing that it says is measured.

The time of a launch is the longest of these, and a launch:

    dram     bytes that have to move, of each argument what the programs touch of it, once / bandwidth
    l2       bytes that each program touches, for each program / the L2's bandwidth
    l1       bytes of the SASS's global and shared accesses / 128 a cycle
    matrix   products / the chip's rate for them
    issue    instructions of the SASS, in its loops as often as they run, for each warp / 4 schedulers
    fma, alu, special, double    the same of one pipe, by its lanes
    latency  a warp's cycles when nothing else runs, for each wave of programs

All but the first two are a multiprocessor's: the one with the most programs decides. How often a loop runs, and what a
program touches, comes from the IR, run for three programs of the launch with its own arguments (``program.py``);
which loop of the SASS that is, from the lines that the code names (``sass.py``); latencies are those of the
registers, barriers and copies that a warp waits for (``warp.py``). Chip facts are in ``runtime/ceilings.py``.

It ranks forms and configurations. Until a device has calibrated it, a time may be 10 % shorter or 30 % longer.
"""
