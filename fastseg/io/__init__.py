"""Files, processes and progress: what commands and tools read, write and print."""
