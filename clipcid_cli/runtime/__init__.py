"""Floor 2: this machine: devices, precision, processes, seeds, worker processes and threads, models."""
