"""The mathematics of reinforcement learning, pure: tensors in, tensors out.

No process group, no flag object, no model. Every per-token tensor is flat over the response tokens of one micro-batch, [r],
with `segments` [r] naming the sample of each token where a formula looks at whole samples. Context, tensor and pipeline
parallelism end before this border: values arrive whole and equal on every rank that holds the same samples.
"""
