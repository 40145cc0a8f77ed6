"""What trains: optimisers, gradients of many processes, what a checkpoint holds, what a step found."""
