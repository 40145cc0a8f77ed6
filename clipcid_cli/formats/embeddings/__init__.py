"""Folders of embeddings, shard by shard: npy, npz, metadata, rows that are mapped, joins by key."""
