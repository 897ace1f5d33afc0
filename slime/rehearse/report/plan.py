"""A plan as text for a terminal and as JSON for programs."""

from __future__ import annotations

from slime.rehearse.advice.plan import Plan, Planned


def plan_as_text(found: Planned) -> str:
    cluster = f"{found.nodes} nodes of {found.gpu} ({found.gpu_memory_gb:g} GB)"
    if not found.understood:
        return f"NO PLAN: the flags are refused on every cluster: {found.nearest}\n"
    if not found.plans:
        lines = [f"NOTHING FITS on {cluster}: {found.nearest}"]
        lines += [f"would fit: {said}" for said in found.would_fit]
        return "\n".join(lines) + "\n"
    lines = [f"{len(found.plans)} plans for {cluster}, each of which passes the rehearsal; {found.tried} were tried"]
    shown: dict[str, str] = {}
    for number, plan in enumerate(found.plans, 1):
        lines += ["", f"-- plan {number}: {_head(plan)}", *_body(plan, shown)]
    return "\n".join(lines) + "\n"


def _head(plan: Plan) -> str:
    return (
        f"{plan.cost.per_million:.3g} GPU-hours per million trained tokens, {plan.prompts:,} prompts a rollout; "
        f"limit: {plan.cost.limit}"
    )


def _body(plan: Plan, shown: dict[str, str]) -> list[str]:
    """shown: text of a YAML -> its name, of the plans before; this one's is added."""
    text = plan.variant.yaml
    known = text in shown
    name = shown.setdefault(text, f"engines-{len(shown) + 1}.yaml") if text is not None else None
    phases = ", ".join(f"{phase.name} {phase.seconds:.1f}" for phase in plan.cost.phases if phase.seconds >= 0.05)
    lines = [
        f"training: {plan.layout.said()}",
        f"engines: {plan.fleet.said() if plan.fleet else 'none'}",
        f"memory: {plan.peak_gb:.1f} GB in the largest phase; the engines hold {plan.assessment.engines.held:,} of the longest "
        "samples at once",
        f"one rollout: {plan.cost.seconds:,.0f} s, {plan.cost.gpu_hours:.3g} GPU-hours ({phases})",
        f"launch with NUM_NODES={plan.nodes} where the launcher has it, and append:",
        f"  {' '.join([*plan.variant.flags, *(('--sglang-config', name) if name else ())])}",
    ]
    if text is not None:
        lines += (
            [f"with the {name} above"]
            if known
            else [f"with {name}, by a full path that the first node sees:", *(f"  {line}" for line in text.splitlines())]
        )
    return lines


def plan_as_json(found: Planned) -> dict[str, object]:
    return {
        "nodes": found.nodes,
        "gpu": found.gpu,
        "tried": found.tried,
        "nearest": found.nearest,
        "would_fit": list(found.would_fit),
        "plans": [
            {
                "append": " ".join(plan.variant.flags),
                "sglang_config": plan.variant.yaml,
                "layout": {**vars(plan.layout.grid), "dp": plan.layout.grid.dp, "layers": list(plan.layout.sizes)},
                "engines": plan.fleet.said() if plan.fleet else "",
                "prompts": plan.prompts,
                "held_at_once": plan.assessment.engines.held,
                "largest_phase_gb": plan.peak_gb,
                "seconds": plan.cost.seconds,
                "gpu_hours": plan.cost.gpu_hours,
                "gpu_hours_per_million_tokens": plan.cost.per_million,
                "limit": plan.cost.limit,
                "phases": {phase.name: phase.seconds for phase in plan.cost.phases},
            }
            for plan in found.plans
        ],
    }
