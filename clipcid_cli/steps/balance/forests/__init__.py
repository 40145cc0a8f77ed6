"""Forests on the disk: read, written, and carried over to other rows."""
