"""Arithmetic of a run: shares, bytes, FLOPs, seconds. Knows no findings and no files."""
