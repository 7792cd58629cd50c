"""Triton kernels, the functions that launch them, and their launch configurations."""
