"""Embed images and captions, shard by shard."""
