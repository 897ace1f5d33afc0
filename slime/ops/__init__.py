"""General operators: block FP8, vocabulary-parallel log-probability, grouped experts and the
rows that go to them, rotary positions.

In: tensors (and at most one process group). Out: tensors. Each operator is plain torch on the CPU; on CUDA a Triton kernel
where that was measured to be faster. Must never know: configs, models, checkpoints, engines.
"""
