"""A node's report of a run: ComfyUI's bar, then a text for its output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.api.events import Bar, Events, counting
from mergetool.comfyui import host

if TYPE_CHECKING:
    from mergetool.comparison.finding import Finding


class NodeEvents(Events):
    """The events of a node."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @property
    def text(self) -> str:
        """The report as the node shows it, in lines."""
        return host.spelled("\n".join(self.lines))

    def note(self, text: str) -> None:
        """A line."""
        self.lines.append(f"note: {text}")

    def finding(self, finding: Finding) -> None:
        """A line."""
        self.lines.append(f"{finding.level}: {finding.text}")

    def progress(self, word: str, total: int, unit: str = "B", *, publishes: bool = False) -> Bar:
        """ComfyUI's bar."""
        return counting(word, total, host.progress(), unit)

    def current(self, path: Path) -> None:
        """One line."""
        self.lines.append(f"{path} was already made of this")


class SaveEvents(NodeEvents):
    """The events of a merge. The text has the output in front of the findings."""

    def done(self, plan: Any, result: Any) -> None:
        """Note size, expression, counts of tensors, the loss to rounding, and warnings."""
        movement = result.outcome.movements.total
        lines = [
            f"{result.target.path}: {plan.header.file_size / 1e9:.3g} GB, {result.seconds:.1f} s",
            str(plan.expression.graph),
            ", ".join(f"{len(names)} {reason}" for reason, names in plan.reasons().items()),
        ]
        if movement.moved:
            lines.append(f"rounding kept {100 * movement.projection:.1f} % of the change")
        self.lines = [*lines, *(f"note: {warning}" for warning in plan.warnings), *self.lines]


class ExtractEvents(NodeEvents):
    """The events of a difference LoRA."""

    def done(self, plan: Any, result: Any) -> None:
        """Show the number of matrices, and how much of their energy is kept."""
        layers = result.extraction.layers
        total = sum(layer.total for layer in layers)
        kept = sum(layer.energy * layer.total for layer in layers) / total if total else 1.0
        line = f"{result.output}: {len(layers)} matrices, energy {kept:.4f}, {result.seconds:.1f} s"
        self.lines = [line, *self.lines]
