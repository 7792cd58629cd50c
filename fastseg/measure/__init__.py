"""Latency studies: cases, timing, the paths of a model, files and plots."""
