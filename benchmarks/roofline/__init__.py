"""Floors: the least time of ops and models on a chip, computed."""
