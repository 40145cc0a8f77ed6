"""What trains, whatever is trained: optimisers, gradients of many processes and parts, averages, a checkpoint's state."""
