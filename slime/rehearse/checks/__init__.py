"""What is asked of a run: each check reads the flags and the arithmetic and writes findings."""
