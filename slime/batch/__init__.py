"""From samples to packed streams: which step, which rank, which micro-batch, which row.

In: a RolloutBatch and sizes. Out: `plan.plan_steps` -> StepPlan (pure, made once by the driver), `layout.SequenceLayout`
(the one index vector that says which stream rows a context-parallel rank holds), `pack.pack` -> MicroBatch (tensors of a rank).
Never knows: process groups, the model, what a loss is.
"""
