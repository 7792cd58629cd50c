"""Atrous convolutions that skip the products with padding: forward, both gradients, regions, cost model."""
