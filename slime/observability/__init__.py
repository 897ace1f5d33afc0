"""What a user sees of a run: one line per rollout, the metric files, and where things are.

Takes numbers, knows nothing of actors.
"""
