"""A door beside train.py: prove a run before it is launched, on any machine.

    python3 -m slime.rehearse FLAGS [--json FILE] [--html FILE]

In: the flags of a launcher. Out: findings (ok, violation, unchecked) and the report; exit status 0 without violations, else 1.
Flags, layout, engines, memory, cost and the weight map are arithmetic without torch. Building every rank (`ranks`) runs
megatron-core on the meta device in child processes. Must never start Ray, an engine, or a training step.
"""
