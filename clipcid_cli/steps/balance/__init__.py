"""Remove semantic repeats: search, sets, keep list, report, new shards."""
