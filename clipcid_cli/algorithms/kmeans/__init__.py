"""k-means: seeding, exact assignment to the nearest centroid, and the bounds that spare it work."""
