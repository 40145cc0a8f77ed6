"""Every pair within a cut-off: exact distances, tiled and partitioned search, the cut-off for a keep ratio."""
