"""What users bring: tar shards, image folders, lists, benchmark folders, behind paths or URLs."""
