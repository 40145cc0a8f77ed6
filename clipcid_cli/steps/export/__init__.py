"""Write a model in other forms, each checked against the original."""
