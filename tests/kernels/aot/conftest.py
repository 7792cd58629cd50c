"""Tests of compiled code: no kernel runs here, and an interpreted kernel cannot be compiled."""

import pytest
import triton


@pytest.fixture(autouse=True)
def _not_interpreted() -> None:
    if triton.knobs.runtime.interpret:
        pytest.skip("kernels are interpreted in this process; run `TRITON_INTERPRET=0 pytest tests/aot`")
