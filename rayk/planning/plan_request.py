"""What `rayk plan` asks and the answer: a model with settings on a GPU by name, or on nodes as measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayk.errors import PlanError
from rayk.planning.gpus import parse_gpu
from rayk.planning.model import Model
from rayk.planning.node_plan import DeviceMemory, NodeMemory
from rayk.planning.nodes import ClusterMemoryPlan, plan_nodes
from rayk.planning.remedies import MOST_TP, Remedy, Trial, remedies
from rayk.planning.settings import GPUS_OF_A_NODE, PlanSettings


@dataclass(frozen=True)
class PlanQuestion:
    """`gpu` for an imagined machine with `count` of it, or as many as are needed; or `nodes` as they are.

    Imagined nodes have 8 GPUs; a replica with more is on several of them.
    """

    model: Model
    settings: PlanSettings
    gpu: DeviceMemory | None = None
    nodes: tuple[NodeMemory, ...] = ()
    uniform: bool = False
    count: int | None = None

    def machine(self) -> Sequence[NodeMemory]:
        """The nodes to plan on."""
        if self.gpu is None:
            return self.nodes
        gpu, s = self.gpu, self.settings
        together = GPUS_OF_A_NODE if s.gpus <= GPUS_OF_A_NODE else s.gpus
        whole = together - together % s.gpus  # what is left of a node beside whole replicas is not used
        left = s.devices if self.count is None else self.count
        sizes = []
        while left > 0:
            size = min(left, whole if self.count is None else together)
            sizes.append(size)
            left -= size
        found = []
        for number, size in enumerate(sizes):
            apart = -(-size // GPUS_OF_A_NODE)
            name = f"{size} x {gpu.name}" + (f" on {apart} nodes" if apart > 1 else "")
            gpus = tuple(DeviceMemory(i, gpu.name, gpu.total, gpu.free) for i in range(size))
            found.append(NodeMemory("" if len(sizes) == 1 else str(number), name, 0, 0, gpus))
        return found

    def plan(self) -> ClusterMemoryPlan:
        """The plan alone. ConfigError for settings that work nowhere."""
        return plan_nodes(self.model, self.settings, self.machine(), self.uniform)

    def changed(self, changes: Sequence[tuple[str, Any]]) -> PlanQuestion:
        """This question with other settings, or another "gpu" by name."""
        gpu = next((parse_gpu(value) for name, value in changes if name == "gpu"), self.gpu)
        settings = replace(self.settings, **{name: value for name, value in changes if name != "gpu"})
        return replace(self, settings=settings, gpu=gpu)

    def answer(self) -> PlanAnswer:
        """The plan and, when it does not fit, what does: each remedy was planned on the whole machine."""
        plan = self.plan()
        return PlanAnswer(self, plan, () if plan.fits else tuple(self._remedies(plan)))

    def _remedies(self, plan: ClusterMemoryPlan) -> list[Remedy]:
        found = []
        if plan.replicas:  # some fit, so fewer replicas are a way out
            found.append(
                Remedy((("dp", len(plan.replicas)),), plan.typical.pages, len(plan.replicas) * self.settings.gpus)
            )
        device = self.gpu or min(plan.typical.devices, key=lambda d: d.memory)
        memory = device.free if isinstance(device, DeviceMemory) else device.memory
        most = max((len(node.gpus) for node in self.nodes), default=1)
        trial = Trial(
            self.model,
            self.settings,
            DeviceMemory(0, device.name, memory, memory),
            self.gpu is None,
            (self.count or MOST_TP) if self.gpu else most,
        )
        found += remedies(trial)
        return [remedy for remedy in found if self._works(remedy)]

    def _works(self, remedy: Remedy) -> bool:
        try:
            return self.changed(remedy.changes).plan().fits
        except PlanError:
            return False


@dataclass(frozen=True)
class PlanAnswer:
    """A plan, and what would fit when it does not."""

    question: PlanQuestion
    plan: ClusterMemoryPlan
    suggestions: tuple[Remedy, ...]

    @property
    def fits(self) -> bool:
        return self.plan.fits
