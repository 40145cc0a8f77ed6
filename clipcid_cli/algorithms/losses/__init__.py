"""The distillation losses: one registry (`registry`), one input (`batch`), small pure functions by family."""
