"""Floor 2: one file per kind of file; atomic writes; sidecars."""
