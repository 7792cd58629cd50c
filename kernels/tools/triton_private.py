"""Names inside Triton that the developer tools use; where one is missing, the tool that needs it says so.

Nothing that launches a kernel uses them.
"""

from typing import Any

from fastseg.kernels.runtime.torch_private import find


class Missing:
    """In the place of a class or a module of Triton; to use it raises."""

    def __init__(self, *args: object):
        raise RuntimeError(
            "this version of Triton has moved a class that fastseg's tools need: use a supported version"
        )


JITFunction: Any = find("triton.runtime.JITFunction", Missing)
DriverBase: Any = find("triton.backends.driver.DriverBase", Missing)
GPUTarget: Any = find("triton.backends.compiler.GPUTarget", Missing)
driver: Any = find("triton.runtime:driver", None)  # the object, not the module of its name


def active_driver() -> Any:
    """Triton's driver, or None before the first launch; unlike ``driver.active`` it looks for no device."""
    return getattr(driver, "_active", None)
