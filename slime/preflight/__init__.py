"""A door beside the rehearsal: what only the real nodes can say, asked of each before the job.

    RAY_ADDRESS=... python3 -m slime.preflight FLAGS

In: the flags of a launcher and a Ray cluster that runs. Out: findings about its nodes; exit status 0 when every node is fit,
else 1. Starts one actor on every node and nothing else.
"""
