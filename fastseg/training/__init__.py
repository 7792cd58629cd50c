"""Training and evaluation on folders of pictures: torch's loaders, optimisers, schedules and processes at work."""
