"""Records of runs, and the pages, tables and plots made of them."""
