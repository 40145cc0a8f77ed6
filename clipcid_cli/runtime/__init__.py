"""Floor 2: this machine: devices, precision, processes, seeds, the encoder, loading."""
