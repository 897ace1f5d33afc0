"""Models that SGLang serves on a CPU through SGLANG_EXTERNAL_MODEL_PACKAGE; imported by engine processes only.

SGLang imports every module of this package and takes its `EntryClass`.
"""
