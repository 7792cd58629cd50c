"""What `make gpu` runs on a machine with a GPU, and what is compiled for it ahead of time."""
