"""Floor 3: one story per step: read, compute, write."""
