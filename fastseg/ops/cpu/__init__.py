"""Forms that are fast on a CPU. Results are right without anything in this folder."""
