"""Training: log-probabilities, advantages, optimizer steps, checkpoints, on megatron-core.

In: a Config, a Device, Ranks and model chunks; then per rollout a RolloutBatch with its StepPlans. Out: a TrainReport (the
same on every rank), named weights, checkpoints. `trainer.Trainer` is the paragraph; `forward` runs the pipeline and the output
layer, `loss` turns log-probs into one number, `columns` makes old log-probs and advantages, `guard` stops at non-finite
gradients, `checkpoint` keeps state. Must never know: prompts, engines, Ray. The driver owns every denominator
(StepPlan.loss_weight): gradients are summed, nothing here divides.
"""
