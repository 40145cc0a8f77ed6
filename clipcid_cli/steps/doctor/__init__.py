"""`doctor`: what this machine gives to a run, beside what a run needs."""
