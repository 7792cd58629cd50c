"""Other projects' own functions, computed with fastseg's. Each module imports its project only when it is called."""
