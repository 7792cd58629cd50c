"""One script a question, on a CPU; each says in its docstring what it measures."""
