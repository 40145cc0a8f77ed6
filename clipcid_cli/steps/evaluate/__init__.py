"""Zero-shot and linear-probe evaluation."""
