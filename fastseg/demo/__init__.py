"""The demo: texture mosaics of real photographs to learn from."""
