"""The graders themselves: text in, a verdict out. They run in worker processes, never in the rollout's own.

In: the name of a grader, a response, a label, the metadata that this grader reads. Out: a number or a mapping. Must never know:
`Sample`, flags, event loops, torch, numpy. Who grades what, and what becomes of a failure, is `slime.rollout.rm_hub`.

    response.py     what a response is once end tokens and thoughts are off, and its last box
    registry.py     name -> grader
    pool.py         the workers as the rollout sees them: one call, one time-out
    nursery.py      the process that imports everything once and forks the workers

This package is imported by every new nursery, so it stays light: no import here.
"""
