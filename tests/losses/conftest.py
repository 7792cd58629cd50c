"""The losses themselves are tried on the reference; ``tests/ops/upsample/test_loss_sums.py`` has the kernels."""

import pytest

import fastseg


@pytest.fixture(autouse=True)
def _reference():
    with fastseg.reference():  # the interpreter would take minutes
        yield
