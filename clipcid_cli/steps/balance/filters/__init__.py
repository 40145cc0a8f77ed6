"""Filters, which drop images before repeats are searched, or after: near a reference, by caption, of crowded clusters."""
