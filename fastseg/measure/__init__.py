"""Latency studies: cases and how they are timed, the paths of a model, files and plots."""
