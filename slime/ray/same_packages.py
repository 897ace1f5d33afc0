"""All nodes of a run have the same packages and the same checkout, or it does not begin: they would compute different sums."""

from __future__ import annotations

from collections.abc import Iterable

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slime.observability import packages
from slime.ray.calls import gather
from slime.ray.machines import alive_nodes
from slime.ray.phases import RESUMES


class SamePackages:
    """Asks every node at once, while others start there. Of one node there is nothing to compare."""

    def __init__(self, addresses: Iterable[str]):
        """addresses: of the run's nodes; this one is the measure where two have as many followers."""
        here, there = ray.util.get_node_ip_address(), alive_nodes()
        nodes = sorted({*addresses, here} & there.keys(), key=lambda address: (address != here, address))
        self._asked = {
            f"node {address}": _versions.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=str(there[address]["NodeID"]), soft=False)
            ).remote()
            for address in (nodes if len(nodes) > 1 else ())
        }

    def check(self) -> None:
        """Raises ValueError with a line that names the nodes that differ, and in what."""
        if not self._asked:
            return
        wrong = packages.differences(gather(self._asked, doing="comparing the nodes' packages"))
        if wrong:
            told = "; ".join(f"{node} has {what}" for node, what in wrong.items())
            raise ValueError(f"starting: {told}: {packages.REMEDY}, and run the same command again; {RESUMES}")


@ray.remote(num_cpus=0, max_retries=0)
def _versions() -> dict[str, str]:
    return packages.versions()
