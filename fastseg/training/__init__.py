"""Training and evaluation on folders of pictures, with torch's loaders, optimisers, schedules and processes."""

from fastseg.models.pruning import Level, Pruned, auto_prune

__all__ = ["Level", "Pruned", "auto_prune"]
