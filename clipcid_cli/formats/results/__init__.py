"""What steps leave: keep list, forest, curve, clusters, metrics, predictions, features, runs."""
