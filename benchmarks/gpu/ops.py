"""The ops of ``make gpu``, in turn, and their cases."""

from collections.abc import Callable
from itertools import chain, zip_longest

from benchmarks import (
    bench_atrous,
    bench_batch_norm_act,
    bench_bilinear_conv_transpose,
    bench_conv_act,
    bench_heads_and_losses,
    bench_inverted_residual,
    bench_pooling,
    bench_separable_conv,
    bench_upsample_bilinear,
    bench_upsample_concat,
    bench_upsample_concat_conv,
    bench_upsample_heads,
)
from benchmarks.problem import Case

OPS = (
    bench_separable_conv,
    bench_atrous,
    bench_batch_norm_act,
    bench_pooling,
    bench_upsample_heads,
    bench_heads_and_losses,
    bench_upsample_bilinear,
    bench_upsample_concat,
    bench_upsample_concat_conv,
    bench_bilinear_conv_transpose,
    bench_inverted_residual,
    bench_conv_act,
)


def cases(tiny: bool, wanted: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """The ops' cases in turn, so that each op has its share; the rehearsal takes the first of each op's modes."""
    columns = []
    for module in OPS:
        found = [case for case in module.cases("tiny" if tiny else "full") if wanted(case)]
        columns.append(list({case.mode: case for case in reversed(found)}.values()) if tiny else found)
    return [case for case in chain.from_iterable(zip_longest(*columns)) if case is not None]
