"""Training and evaluation on folders of pictures: torch's loaders, optimisers, schedules and processes at work."""

from fastseg.models.pruning import Level, Pruned, auto_prune

__all__ = ["Level", "Pruned", "auto_prune"]
