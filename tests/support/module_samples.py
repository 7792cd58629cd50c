"""torch's own samples of modules, as installed. Private API: how many there are is the version's."""

from unittest import mock

import torch
import torch_tests  # noqa: F401  # a stand-in for expecttest

with mock.patch.object(torch.backends, "disable_global_flags"):  # the import would freeze them for the whole process
    from torch.testing._internal.common_modules import module_db


def module_samples(name: str, *, dtype: torch.dtype, device: str) -> list:
    """The training samples of ``torch.nn.<name>``."""
    (info,) = [m for m in module_db if m.module_cls is getattr(torch.nn, name)]
    return list(info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=True))
