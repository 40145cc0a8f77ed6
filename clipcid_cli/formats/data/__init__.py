"""Image-text data: tar shards, image folders, lists, benchmark folders, at local paths or URLs."""
