"""Prompts become graded groups of samples.

In: prompt files, a router address, graders and filters (built in or by dotted path). Out: `RolloutFnTrainOutput` with groups of
`Sample`, and a `RolloutBatch` made of them (`to_batch`). Must never know: Megatron, Ray, how an engine is started or updated.

Read `sglang_rollout.py` first (one rollout), then `generation.py` (one sample), `data_source.py` (which prompts come next),
`rm_hub` (who grades what), `grading` (the graders, in processes of their own), `plugins.py` (what a user may replace),
`http.py` (a plugin's own requests).
Supervised data: `messages.py` (what a conversation may look like), `chat_template.py` (one rendering, and whose each character
is), `sft_masks.py` (which tokens are trained).
"""
