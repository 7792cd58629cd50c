"""Batch norm, residual and activation: statistics, forward, backward."""
