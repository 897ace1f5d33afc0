"""The model: built for this rank, loaded from and saved as Hugging Face files, exported to the engines.

In: the config's model section, the checkpoint's config.json, `Ranks`, `Device`. Out: GPTModel chunks, HF-named tensors.
`hf_config`, `names`, `hf_io` and `coverage` need no megatron-core; everything else calls `slime.compat.megatron.prepare()`
first. Must never know: rewards, losses, optimizers, engines.
"""
