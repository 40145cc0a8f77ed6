"""k-means: first centroids, exact assignment to the nearest centroid, Lloyd's iterations and the bounds that save work."""
