"""The movement of the anchor in a merge, by tensor and by group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mergetool.ops.movement import Movement
from mergetool.recipe.plan import Plan


@dataclass(frozen=True)
class Movements:
    """The ``Movement`` of every merged part of every output tensor, in file order."""

    parts: Mapping[tuple[str, str], Movement] = field(default_factory=dict)  # (output tensor, part)
    sampled: bool = False  # some elements of large tensors were not looked at

    @classmethod
    def of(cls, chunks: Iterable[tuple[tuple[str, str], Movement]], *, sampled: bool = False) -> Movements:
        """The sums over chunks of parts."""
        by_part: dict[tuple[str, str], list[Movement]] = {}
        for place, movement in chunks:
            by_part.setdefault(place, []).append(movement)
        return cls({place: Movement.total(movements) for place, movements in by_part.items()}, sampled)

    @property
    def total(self) -> Movement:
        """The sum over everything."""
        return Movement.total(self.parts.values())

    def tensors(self) -> dict[str, Movement]:
        """The movements by output tensor, in file order."""
        members: dict[str, list[Movement]] = {}
        for (tensor, _), movement in self.parts.items():
            members.setdefault(tensor, []).append(movement)
        return {tensor: Movement.total(movements) for tensor, movements in members.items()}

    def groups(self, plan: Plan) -> dict[str, Movement]:
        """The movements by group of the anchor, in its family's order.

        Groups overlap, so they do not add up to the total.
        """
        anatomy = plan.inputs[0].anatomy
        members: dict[str, list[Movement]] = {group: [] for group in anatomy.family.group_names(anatomy)}
        for (_, part), movement in self.parts.items():
            for group in anatomy.family.groups(part, anatomy.parts[part].shape):
                members[group].append(movement)
        return {group: Movement.total(movements) for group, movements in members.items() if movements}
