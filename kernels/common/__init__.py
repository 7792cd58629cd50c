"""Device functions (``@triton.jit``) that two or more families share."""
