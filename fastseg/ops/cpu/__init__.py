"""Forms that are fast on a CPU. Nothing in here is needed for a right result."""
