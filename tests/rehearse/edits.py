"""Edits of a recipe: flags, environment, and words of one group of its YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.rehearse.recipes import Recipe

Edit = Callable[[Recipe], Recipe]
DISPATCH = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
SPECULATIVE = tuple(
    f"--sglang-speculative-{name}"
    for name in ("algorithm", "num-steps", "eagle-topk", "num-draft-tokens", "draft-attention-backend")
)


def flags(*words: str) -> Edit:
    """`--name value ...` put in the place of what the recipe says."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append([word])
        else:
            groups[-1].append(word)

    def edit(recipe: Recipe) -> Recipe:
        for name, *values in groups:
            recipe = recipe.with_flag(name, *values)
        return recipe

    return edit


def without(*names: str) -> Edit:
    def edit(recipe: Recipe) -> Recipe:
        for name in names:
            recipe = recipe.without(name)
        return recipe

    return edit


def env(**values: str) -> Edit:
    return lambda recipe: recipe.with_env(**values)


def unset(name: str) -> Edit:
    return lambda recipe: replace(recipe, env={key: value for key, value in recipe.env.items() if key != name})


def in_group(role: str, *changes: tuple[str, str]) -> Edit:
    """Words of one group of the YAML, each with what stands in its place."""

    def edit(recipe: Recipe) -> Recipe:
        begin = recipe.yaml.index(f"worker_type: {role}")
        end = recipe.yaml.find("worker_type:", begin + 1)
        end = len(recipe.yaml) if end < 0 else end
        group = recipe.yaml[begin:end]
        for old, new in changes:
            assert old in group, f"{old!r} is not in the {role} group"
            group = group.replace(old, new)
        return replace(recipe, yaml=recipe.yaml[:begin] + group + recipe.yaml[end:])

    return edit


def all_of(*edits: Edit) -> Edit:
    def edit(recipe: Recipe) -> Recipe:
        for one in edits:
            recipe = one(recipe)
        return recipe

    return edit
