"""The passes over a graph, one file each: a name, and ``run(work)``, which rewrites it and says what matched."""
