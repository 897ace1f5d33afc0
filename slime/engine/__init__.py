"""The room of the rollout engines: SGLang servers and their router, as processes and as HTTP.

In: a config's engine groups and --sglang-* text. Out: running engines with addresses, generated tokens, weight versions.
Must never know: rewards, advantages, trainers, Ray. Only `serve`, `describe` and `host_models` import SGLang, and only in
processes of their own.

plan          config -> EngineSpec per engine (pure)        spec       what an engine is
versions      the one table of what differs between SGLang versions; options typed against `options/*.json`
kinds         the one place that knows CUDA from CPU        ports      allocated by binding
process       EngineProcess: start, wait_ready, check, stop router     RouterProcess
client        EngineClient, RouterClient                    payload    the body of a weight bucket
host_models   GLM-5.2 on the CPU, SGLang's external model package
"""
