"""What else would be possible: curves of what a GPU-hour buys, and plans for a cluster.

Each is a change of the run's own flags, read and judged like them, so that advice passes the rehearsal that gives it. Knows
findings, not reports.
"""
