"""Comparisons of speed, memory and launches: README.md says which command does what."""
