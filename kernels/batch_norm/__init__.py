"""Batch norm + residual + activation: statistics, forward, backward."""
