"""Floor 3: one story per file: read, compute, write."""
