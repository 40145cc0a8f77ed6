"""Cluster the kept images' embeddings."""
