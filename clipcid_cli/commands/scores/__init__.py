"""How scores are shown: a table for each task, and two results side by side."""
