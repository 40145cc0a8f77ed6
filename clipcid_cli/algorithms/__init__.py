"""Floor 2: tensors in, tensors out; no files, no terminal, no rank."""
