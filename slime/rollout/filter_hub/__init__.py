"""Filters that a flag can name: keep or drop a finished group."""
