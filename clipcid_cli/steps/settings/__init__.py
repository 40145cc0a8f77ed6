"""What a user can set, one frozen dataclass per step, in files that import nothing heavy."""
