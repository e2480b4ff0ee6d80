"""The one opener of models: any MODEL argument becomes an `Input`, read or computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from mergetool import models
from mergetool.adapters import unmatched
from mergetool.adapters.lora_file import is_lora, open_lora
from mergetool.adapters.rows import anatomy_of
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import anchor, noise
from mergetool.engine.computed import ComputedCheckpoint
from mergetool.models import OpenedModel
from mergetool.options.merging import MergeOptions
from mergetool.recipe.argument import expression_of
from mergetool.recipe.expression import Expression, parse
from mergetool.recipe.plan import Plan, plan_merge
from mergetool.recipe.steps import Input


class Inputs:
    """The inputs of several operations, each opened and looked at once; ``stack`` closes them.

    What a LoRA has for no tensor of its model is an error, or with ``skip_unmatched`` named. Without ``fingerprints`` no tensor is read, which is
    enough where none will be: expressions are computed in the order that their models' contents give.
    """

    def __init__(self, stack: ExitStack, *, fingerprints: bool = True, skip_unmatched: bool = False) -> None:
        self._stack = stack
        self._fingerprints = fingerprints
        self.skip_unmatched = skip_unmatched
        self._known = [entry.name for entry in models.listing()]
        self._models: dict[str, Input] = {}
        self._loras: dict[tuple[str, str], Input] = {}  # of a name and the anchor: what it adds depends on both
        self._prints: dict[Checkpoint, str] = {}
        self._noise: dict[str, float | None] = {}

    def plan(self, text: str, options: MergeOptions) -> Plan:
        """The plan of a merge. Raises UsageError where several models could be its anchor and it matters which."""
        return self.planned(parse(text, known=self._known), options)

    def planned(self, expression: Expression, options: MergeOptions) -> Plan:
        """The same for an expression that was read."""
        if options.keep_from in expression.anchors:
            expression = expression.anchored(options.keep_from)
        return anchor.chosen(expression, lambda name: self._plan_from(expression.anchored(name), options))

    def _plan_from(self, expression: Expression, options: MergeOptions) -> Plan:
        names = list(expression.models)
        if options.keep_from and options.keep_from not in names:
            names.append(options.keep_from)
        inputs = [self.model(name) for name in names]
        loras = [self.lora(name, inputs[0]) for name in expression.loras]
        widths = {part: width for lora in loras for part, width in lora.widens.items()}
        inputs = [model.widened(widths) for model in inputs] + loras
        if not self._fingerprints:
            return plan_merge(expression, inputs, options)
        prints = self.fingerprints(inputs)
        known = {model.name: self._share(model) for model in inputs if not model.is_lora}
        shares = {name: share for name, share in known.items() if share is not None}
        arranged = expression.arranged(contents_of(inputs, prints))
        return plan_merge(arranged, inputs, options, fingerprints=prints, noise=shares)

    def model(self, name: str) -> Input:
        """A model by a MODEL argument, opened. Raises what opening it raises, and ExpressionError."""
        if name not in self._models:
            expression = self._expression_of(name)
            self._models[name] = self._read(name) if expression is None else self._computed(name, expression)
        return self._models[name]

    def lora(self, name: str, first: Input) -> Input:
        """Open a LoRA as its change to the model ``first``. Raises what `open_change` raises."""
        key = name, first.name
        if key not in self._loras:
            self._loras[key] = self._change(name, first)
        return self._loras[key]

    def change_or_model(self, name: str, first: Input) -> Input:
        """Open the other side of a difference to ``first``: a model, or a LoRA on it.

        Its keys tell which. Raises what `model` and `lora` raise.
        """
        if self._expression_of(name) is None and is_lora(models.resolve(name).path):
            return self.lora(name, first)
        return self.model(name)

    def _expression_of(self, name: str) -> Expression | None:
        return expression_of(name)

    def _read(self, name: str) -> Input:
        """A model that lies in files."""
        opened = models.open_model(name)
        self._stack.enter_context(opened.checkpoint)
        return Input.of(opened)

    def _change(self, name: str, first: Input) -> Input:
        return open_change(name, first, self._stack, skip_unmatched=self.skip_unmatched)

    def _computed(self, name: str, expression: Expression) -> Input:
        """A model that is computed while it is read, as the merge with default options would be written."""
        plan = self.planned(expression, MergeOptions())
        checkpoint = self._stack.enter_context(ComputedCheckpoint(plan, name))
        return Input.of(models.recognised(name, checkpoint), plan)

    def fingerprints(self, inputs: Iterable[Input]) -> dict[str, str]:
        """The fingerprint of every file that ``inputs`` are made of, by its name here."""
        leaves = {leaf.name: leaf.checkpoint for model in inputs for leaf in model.leaves()}
        for checkpoint in leaves.values():
            if checkpoint not in self._prints:
                self._prints[checkpoint] = checkpoint.fingerprint()
        return {name: self._prints[checkpoint] for name, checkpoint in leaves.items()}

    def _share(self, model: Input) -> float | None:
        if model.name not in self._noise:
            self._noise[model.name] = noise.measure(model)
        return self._noise[model.name]


def contents_of(inputs: Iterable[Input], prints: Mapping[str, str]) -> dict[str, str]:
    """Map each input's name to its contents, as text.

    A file's is its print in ``prints``; an expression is written over those.

    Expressions order their operands by it.
    """
    contents = dict(prints)
    for model in inputs:
        if model.plan is not None:
            contents[model.name] = model.plan.expression.render(contents_of(model.plan.inputs, prints))
    return contents


@contextmanager
def opened(name: str, *, fingerprints: bool = True) -> Iterator[Input]:
    """A MODEL, closed at the end of the ``with`` block. Without ``fingerprints`` no tensor of it is to be read, as for `Inputs`."""
    with ExitStack() as stack:
        yield Inputs(stack, fingerprints=fingerprints).model(name)


def open_model(model: str, *, names_only: bool = False) -> OpenedModel:
    """Open and recognise a MODEL: a name, path, address or expression.

    Only headers and markers are read; of an expression's models a few megabytes too. An expression's tensors are computed when they are read.
    Raises InputMissing, DataError and UsageError, ExpressionError for an expression, and DataError for quantised weights of unreadable kinds
    unless ``names_only`` says that only names and stored shapes matter.
    """
    if expression_of(model) is None:
        return models.open_model(model, names_only=names_only)
    with ExitStack() as stack:
        computed = Inputs(stack, fingerprints=not names_only).model(model)
        stack.pop_all()  # the checkpoint closes its operands
        return OpenedModel(computed.name, computed.checkpoint, computed.anatomy)


def open_change(name: str, model: Input, stack: ExitStack, *, place: str | None = None, skip_unmatched: bool) -> Input:
    """Open a LoRA as its change to ``model``; ``stack`` closes it.

    It is read from ``place`` if that is not its name.

    Raises InputMissing, DataError for a file that is no LoRA or does not fit, for one that changes nothing in the model at all, and for
    keys that do not, unless those are to be skipped.
    """
    file = stack.enter_context(open_lora(models.resolve(place or name).path, name=name, anatomy=model.anatomy))
    unmatched.require_match(file, model.name, skip_unmatched=skip_unmatched)
    wide = model.widened(file.widens)
    return Input(
        name,
        file.checkpoint,
        anatomy_of(file, wide.anatomy, wide.checkpoint),
        is_lora=True,
        unmatched=unmatched.left_aside(file),
        remarks=unmatched.remarks(file),
        widens=file.widens,
    )
