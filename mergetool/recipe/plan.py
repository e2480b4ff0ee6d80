"""A merge resolved against real headers: every tensor's fate, before any tensor is read.

Policy, for every part (a parameter under its canonical name) of the anchor:

* in every model that the expression needs and blendable (a float type): **merged**;
* selected by ``protect`` or ``exclude``, or not by ``include``: **kept**, from the anchor or ``keep_from``;
* in ``multipliers`` with 0: kept from the anchor;
* missing from one of the other models: kept, and named; a LoRA that does not change it counts as zero;
* integers, booleans and other types that cannot be blended: kept, and named;
* of different shape in two models: padded with zeros where `recipe.unequal` says so, else an error, unless it is kept; it then has the
  shape of the model that it is kept from.

Every model of the expression has to meet the first one: see `arch.meeting`.

A kept part is copied bit for bit when its dtype is already the output's, and rounded once when it is not; a quantised weight is
copied, with its scales, when the output's container is its own. Without ``quant`` quantised weights become BF16. A part that
only other models have is carried where `recipe.unequal` says so, else left out, and named. What is
bundled with the model (a VAE or text encoder): see `recipe.bundled`; metadata: see `recipe.metadata`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import MappingProxyType

from mergetool.adapters.rows import ChangeRows, StackedRows
from mergetool.adapters.whole import WholeRows
from mergetool.arch import Anatomy, Part, encoders, meeting, prefixes
from mergetool.arch.signs import IN_FP16
from mergetool.checkpoint.dtypes import BF16, F32, DType
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.names import quoted
from mergetool.errors import FamilyError, UsageError
from mergetool.ops.program import Load, Program
from mergetool.options.merging import MergeOptions
from mergetool.quant import register
from mergetool.quant.quantiser import Quantiser
from mergetool.quant.weights import is_side_tensor
from mergetool.recipe import bundled, groups, kept, metadata, provenance, quantised, unequal
from mergetool.recipe.compiler import compile_graph, graph_of
from mergetool.recipe.expression import Expression
from mergetool.recipe.graph import Sum
from mergetool.recipe.stacks import Stack, stack_loras, stack_name
from mergetool.recipe.steps import COPY, MERGED, SET_TO_0, Input, OutputTensor, Step, Window, window_of
from mergetool.recipe.unequal import Padding, Unequal


@dataclass(frozen=True)
class Plan:
    """Everything a merge will do. ``tensors`` are in the order of the output file."""

    expression: Expression
    inputs: tuple[Input, ...]
    options: MergeOptions
    layout: str
    prefix: str
    tensors: tuple[OutputTensor, ...]
    left_out: tuple[tuple[str, str], ...]  # name, reason
    anatomy: Anatomy  # the anchor's, with what the output has more
    warnings: tuple[str, ...] = ()
    padded: tuple[Padding, ...] = ()
    header: Header = field(default_factory=lambda: Header.plan([]))

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that will be read from all inputs."""
        return sum(
            window.nbytes(step.elements) for tensor in self.tensors for step in tensor.steps for window in step.windows
        )

    @property
    def registers(self) -> int:
        """The most float32 registers that any step needs."""
        return max((s.program.registers for t in self.tensors for s in t.steps if s.program), default=1)

    def remarks(self) -> list[str]:
        """Remarks for an operation that reads the result: the warnings, and the missing tensors."""
        left = [f"{len(self.left_out)} left out, {name} ({reason})" for name, reason in self.left_out[:1]]
        return [*self.warnings, *left]

    def reasons(self) -> dict[str, list[str]]:
        """Reason -> the output tensors with a part of that reason, in file order."""
        names_by_reason: dict[str, dict[str, None]] = {}
        for tensor in self.tensors:
            for step in tensor.steps:
                if not is_side_tensor(tensor.name):
                    names_by_reason.setdefault(step.reason, {})[tensor.name] = None
        return {reason: list(names) for reason, names in names_by_reason.items()}


def plan_merge(
    expression: Expression,
    inputs: Sequence[Input],
    options: MergeOptions,
    *,
    fingerprints: Mapping[str, str] | None = None,
    noise: Mapping[str, float] = MappingProxyType({}),
) -> Plan:
    """Resolve ``expression`` against the opened ``inputs``.

    The anchor is in front; the model of ``keep_from`` may come last.

    ``fingerprints`` maps input names to content fingerprints for the metadata; without them a placeholder of the same
    length is planned. ``noise`` maps the names of quantised inputs to the share of rounding noise in their weights, for
    the warnings. Raises FamilyError where models do not fit together, PatternError for a pattern that selects
    nothing, UsageError for options that contradict each other.
    """
    return _Planner(expression, tuple(inputs), options, noise).plan(fingerprints or {})


class _Planner:
    def __init__(
        self, expression: Expression, inputs: tuple[Input, ...], options: MergeOptions, noise: Mapping[str, float]
    ) -> None:
        inputs = tuple(bundled.as_parts(model, options.bundled) for model in inputs)
        self.beside = inputs[0].anatomy.beside
        self.noise = noise
        self.expression = expression
        self.inputs = inputs
        self.first = inputs[0]
        self.family = self.first.anatomy.family
        for other in inputs[1:]:
            meeting.check_families(self.first, other, by_name=bool(options.include))
        self.unequal = Unequal.of(expression, inputs)
        self.anatomy = self.unequal.anatomy
        self.options = options = replace(options, multipliers=groups.expand(options.settings, self.family))
        self.column = {model.name: i for i, model in enumerate(inputs)}
        self.needed = [self.column[name] for name in expression.graph.models()]
        self.loras = [self.column[name] for name in expression.loras]
        self.keeper = self.column[options.keep_from] if options.keep_from else 0
        if options.prefix is not None:
            prefixes.check(options.prefix)
        self.kept = kept.parts(
            options, self.anatomy, self.inputs[self.keeper], self.unequal.carried.keys() | self.beside
        )
        self.multiplier = groups.resolve(self.options.settings, self.anatomy)
        self.dropped = self._dropped()
        parts = {name: part for name, part in self.anatomy.parts.items() if name not in self.dropped}
        self.anatomy = replace(self.anatomy, parts=parts)
        self.unmet = self._check_meeting()
        self.programs: dict[
            tuple[Fraction, tuple[str, ...], tuple[str, ...], tuple[str, ...]], tuple[Program, list[Stack]]
        ] = {}
        self.quantiser = register.quantiser(options.quant) if options.quant else None
        if options.scale_search and not (self.quantiser and self.quantiser.has_tensor_scale):
            able = " or ".join(f"`quant={one.quant}`" for one in register.quantisers() if one.has_tensor_scale)
            raise UsageError(f"`scale_search` looks for the scale of a whole tensor; it needs {able}.")
        self.is_quantised = quantised.is_quantised(self.anatomy, self.quantiser) if self.quantiser else lambda _: False

    def plan(self, fingerprints: Mapping[str, str]) -> Plan:
        layout, prefix, outputs = self._outputs()
        tensors = [tensor for name, parts in outputs for tensor in self._tensors(name, parts)]
        left_out = self._not_in_output()
        same_layout = layout == self.first.anatomy.layout
        same_names = same_layout and bool(prefix or prefix == self.first.anatomy.prefix)
        beside, not_beside = bundled.outputs(
            self.first,
            self.options.bundled,
            self._beside() if same_names else {},
            same_layout=same_layout,
            same_names=same_names,
        )
        if same_names and prefix in prefixes.IN_COMFYUI:
            beside += bundled.from_others(self.inputs, self.needed, self.options.bundled)
        tensors += [*beside, *bundled.markers(self.first, prefix, {tensor.name for tensor in tensors})]
        left_out += not_beside
        copied = {w.tensor for tensor in tensors for step in tensor.steps for w in step.windows if w.input == 0}
        left_out += [(n, "scale or marker of codes") for n in self.first.anatomy.sides if n not in copied]
        changed = any(step.reason == MERGED for tensor in tensors for step in tensor.steps)
        carried, warnings = metadata.travelling(self.first, {tensor.name for tensor in tensors}, changed=changed)
        carried |= {"modelspec.title": self.options.title} if self.options.title else {}
        record = provenance.metadata(self.expression, self.inputs, self.options, fingerprints)
        tensors = self._in_file_order(tensors) if layout == self.first.anatomy.layout else tensors
        header = Header.plan((entry for tensor in tensors for entry in tensor.entries()), {**carried, **record})
        by_name = {tensor.name: tensor for tensor in tensors}
        happened = {
            s.part: s.reason for tensor in tensors for s in tensor.steps if s.part not in self.kept and s.multiplier
        }
        padded = tuple(padding for name, padding in self.unequal.padded.items() if name in happened)
        return Plan(
            self.expression,
            self.inputs,
            self.options,
            layout,
            prefix,
            tuple(by_name[name] for name in header.tensors if name in by_name),
            tuple(left_out),
            self._output_anatomy(),
            (
                *self._warnings(),
                *self.unequal.notes(happened, self.expression),
                *bundled.warnings(self.inputs, tensors, self.options.bundled),
                *metadata.disagreements(self.inputs, carried),
                *warnings,
            ),
            padded,
            header,
        )

    # --- choices ---------------------------------------------------------------------------------------------

    def _check_meeting(self) -> list[str]:
        """Note parts of every other model of the expression that do not meet the first, where they are many."""
        chosen = [n for n in self.first.anatomy.parts if n not in self.kept and self.multiplier.get(n, 1) != 0]
        for lora in (self.inputs[column] for column in self.loras):
            meeting.check_change(self.first, lora, chosen, lora.unmatched)
        others = [self.inputs[column] for column in self.needed if column != 0]
        carried = self.unequal.carried.keys() - self.dropped.keys()
        return [text for model in others for text in meeting.check(self.first, model, chosen, carried)]

    def _dropped(self) -> dict[str, str]:
        """The parts that would be carried, but are to be kept as a model has them that has them not; with the reason."""
        keeper = self.inputs[self.keeper].anatomy.parts
        zero = {name: SET_TO_0 for name in self.unequal.carried if self.multiplier.get(name) == 0}
        held = {name: reason for name, reason in self.kept.items() if name in self.unequal.carried}
        return {name: reason for name, reason in (zero | held).items() if name not in held or name not in keeper}

    def _outputs(self) -> tuple[str, str, list[tuple[str, tuple[str, ...]]]]:
        anatomy = self.anatomy
        wanted = self.options.layout
        if self.quantiser is not None:
            wanted = quantised.layout_of(anatomy, wanted)
        layout = wanted or anatomy.layout
        self.family.check_layout(layout)
        prefix = self.options.prefix
        if wanted is None and prefix is None:
            return layout, anatomy.prefix, list(anatomy.stored_parts().items())
        if self.beside and self.options.bundled == "merge":
            raise UsageError(
                "`bundled=merge` needs the model's own layout and prefix; leave out `layout` and `prefix`."
            )
        outputs = anatomy.outputs(layout)
        if prefix and any(name.startswith(prefix) for name, _ in outputs):
            doubled = next(name for name, _ in outputs if name.startswith(prefix))
            raise FamilyError(
                f"{self.first.name} has {quoted(doubled)} under that prefix and other tensors under none, so that `prefix={prefix}` would "
                "double it; give a file whose tensors have one prefix."
            )
        return layout, prefix or "", [(f"{prefix or ''}{name}", parts) for name, parts in outputs]

    # --- tensors ---------------------------------------------------------------------------------------------

    def _tensors(self, name: str, part_names: tuple[str, ...]) -> list[OutputTensor]:
        """The output tensor ``name``, or the copies of an untouched quantised one."""
        parts = [self._written(part) for part in part_names]
        quantiser = self.quantiser if self.is_quantised(parts) else None
        dtype = F32 if quantiser else self._output_dtype(parts)
        rows = sum(part.shape[0] for part in parts) if len(parts) > 1 else None
        shape = parts[0].shape if rows is None else (rows, *parts[0].shape[1:])
        steps: list[Step] = []
        first = 0
        for part in parts:
            steps.append(self._step(part, first, dtype, quantiser))
            first += part.numel
        whole = quantised.copied(name, parts, steps, self.inputs, quantiser) if quantiser else None
        return whole or [OutputTensor(name, dtype, shape, tuple(steps), quantiser)]

    def _beside(self) -> dict[str, list[OutputTensor]]:
        """The tensors beside the model by their stored names, as the expression makes them."""
        return {name: self._tensors(name, parts) for name, parts in self.anatomy.stored_parts(beside=True).items()}

    def _keeper_of(self, part: str) -> int:
        """The input that a part is kept from: `keep_from` of one that a choice keeps, where that model has it."""
        return self.keeper if part in self.kept and part in self.inputs[self.keeper].anatomy.parts else 0

    def _written(self, name: str) -> Part:
        """The part as it is written: in the shape of the model that it is kept from, or padded."""
        mine = self.anatomy.parts[name]
        if name in self.kept:
            shape = self.inputs[self._keeper_of(name)].anatomy.parts[name].shape
        else:
            shape = mine.shape if self.multiplier.get(name) == 0 else self.unequal.shape(mine)
        return mine if shape == mine.shape else replace(mine, shape=shape)

    def _output_dtype(self, parts: Sequence[Part]) -> DType:
        stored = [BF16 if part.encoding is not None else part.dtype for part in parts]
        widest = max(stored, key=lambda dtype: dtype.bits)
        casts = self.options.bundled == "merge" or not any(part.name in self.beside for part in parts)
        if casts and self.options.stored is not None and all(part.dtype.blendable for part in parts):
            return self.options.stored
        return widest

    def _step(self, part: Part, first: int, dtype: DType, quantiser: Quantiser | None) -> Step:
        multiplier = self.multiplier.get(part.name, Fraction(1))
        carried = self.unequal.carried.get(part.name) if part.name not in self.kept else None
        if carried is not None:
            return self._carried(part, first, dtype, quantiser, carried)
        reason = self.kept.get(part.name) or (SET_TO_0 if multiplier == 0 else self._obstacle(part.name))
        if reason is None and self._program(part.name, multiplier)[0] == COPY:  # of the anchor itself
            reason = "not changed by a LoRA" if self.loras else "copied"
        if reason is not None:
            step = self._copy(part, first, dtype, quantiser, self._keeper_of(part.name), reason)
            return replace(step, multiplier=Fraction(0)) if reason.startswith(SET_TO_0) else step
        program, stacks = self._program(part.name, multiplier)
        columns = self._columns(program)
        if 0 not in columns:
            columns += (0,)
        windows = tuple(self._window(column, part.name, stacks) for column in columns)
        return Step(
            part.name, first, part.numel, self._reindexed(program), windows, MERGED, columns.index(0), multiplier
        )

    def _copy(
        self, part: Part, first: int, dtype: DType, quantiser: Quantiser | None, column: int, reason: str
    ) -> Step:
        """The step of a part that is one model's, bit for bit or rounded once."""
        model = self.inputs[column]
        own = model.anatomy.parts[part.name]
        window = window_of(column, model, own)
        if own.dtype == dtype and own.encoding is None and quantiser is None:
            return Step(part.name, first, part.numel, None, (window,), reason)
        reason += quantised.rounded_to(quantiser.quant if quantiser else dtype.name)
        return Step(part.name, first, part.numel, COPY, (window,), reason)

    def _carried(self, part: Part, first: int, dtype: DType, quantiser: Quantiser | None, graph: Sum) -> Step:
        """The step of a part that the anchor lacks."""
        program = compile_graph(graph, self.column)
        columns = self._columns(program)
        if program.instructions == (Load(0, columns[0]),):
            return self._copy(part, first, dtype, quantiser, columns[0], unequal.reason_of(graph))
        windows = tuple(self._window(column, part.name) for column in columns)
        return Step(part.name, first, part.numel, self._reindexed(program), windows, unequal.reason_of(graph))

    def _obstacle(self, part: str) -> str | None:
        """The reason why a part that the user did not keep cannot be merged; raises FamilyError for a clash of shapes."""
        mine = self.first.anatomy.parts[part]
        if not mine.numel:
            return "a marker without elements"
        for column in (*self.needed, *self.loras):
            theirs = self.inputs[column].anatomy.parts.get(part)
            if theirs is None and self.inputs[column].is_lora:
                continue
            if theirs is None:
                return f"not in {self.inputs[column].name}"
            if not (theirs.dtype.blendable and mine.dtype.blendable):
                return f"{theirs.dtype.name if mine.dtype.blendable else mine.dtype.name} is not blended"
            if theirs.shape != mine.shape and part in self.beside:
                return f"of another shape in {self.inputs[column].name}"
            if theirs.shape != mine.shape and part not in self.unequal.padded:
                raise unequal.shape_clash(part, self.first, self.inputs[column])
        return None

    def _program(self, part: str, multiplier: Fraction) -> tuple[Program, list[Stack]]:
        """The program of a part, and the LoRAs that it computes as one: their columns follow the inputs'."""
        changing = {self.inputs[i].name: self.inputs[i].anatomy.parts.get(part) for i in self.loras}
        absent = tuple(name for name, stored in changing.items() if stored is None)
        products = tuple(
            n for n, p in changing.items() if p and isinstance(p.encoding, ChangeRows) and p.encoding.is_product
        )
        unscaled = tuple(n for n, p in changing.items() if p and isinstance(p.encoding, WholeRows))
        key = multiplier, absent, products, unscaled
        if key not in self.programs:
            graph, stacks = stack_loras(graph_of(self.expression, multiplier, absent, unscaled), products)
            columns = {stack_name(i): len(self.inputs) + i for i in range(len(stacks))}
            self.programs[key] = compile_graph(graph, self.column | columns), stacks
        return self.programs[key]

    @staticmethod
    def _columns(program: Program) -> tuple[int, ...]:
        return tuple(step.model for step in program.instructions if isinstance(step, Load))

    @classmethod
    def _reindexed(cls, program: Program) -> Program:
        """The program with its loads numbered 0, 1, 2...: each load has its own window."""
        count = iter(range(len(program.instructions)))
        return Program(tuple(Load(s.register, next(count)) if isinstance(s, Load) else s for s in program.instructions))

    def _window(self, column: int, part_name: str, stacks: Sequence[Stack] = ()) -> Window:
        if column >= len(self.inputs):
            items = []
            for factor, name in stacks[column - len(self.inputs)]:
                rows = self.inputs[self.column[name]].anatomy.parts[part_name].encoding
                assert isinstance(rows, ChangeRows)
                items.append((factor, rows))
            first = self.column[stacks[column - len(self.inputs)][0][1]]
            window = Window(first, items[0][1].tensor, 0, F32, StackedRows.of(items))
            return self.unequal.window(window, self.inputs[first].anatomy.parts[part_name])
        part = self.inputs[column].anatomy.parts[part_name]
        return self.unequal.window(window_of(column, self.inputs[column], part), part)

    def _output_anatomy(self) -> Anatomy:
        """The output's parts, in their shapes there."""
        return replace(self.anatomy, parts={name: self._written(name) for name in self.anatomy.parts})

    def _in_file_order(self, tensors: list[OutputTensor]) -> list[OutputTensor]:
        place = {name: i for i, name in enumerate(self.first.checkpoint.tensors)}
        return sorted(tensors, key=lambda tensor: place.get(tensor.name, len(place)))

    @property
    def _outputs_are_relaid(self) -> bool:
        layout, prefix = self.options.layout, self.options.prefix
        if self.quantiser is not None:
            layout = quantised.layout_of(self.first.anatomy, layout)
        return layout is not None or prefix is not None

    # --- what is said ----------------------------------------------------------------------------------------

    def _not_in_output(self) -> list[tuple[str, str]]:
        left_out: dict[str, str] = {}
        if self._outputs_are_relaid:
            unused = (name for name in self.first.anatomy.own if name in self.family.unused)
            left_out |= dict.fromkeys(unused, "never read by the model")
        for model in self.inputs[1:]:
            for name in model.anatomy.own:
                if name not in self.anatomy.parts:
                    of_encoder = model.is_lora and encoders.is_encoder(name)
                    reason = "of a text encoder, which is not merged" if of_encoder else f"only in {model.name}"
                    left_out.setdefault(name, self.dropped.get(name) or reason)
            left_out |= {name: f"in {model.name}: {reason}" for name, reason in model.unmatched}
        return list(left_out.items())

    def _warnings(self) -> list[str]:
        warnings = [*self.unmet, *(remark for model in self.inputs for remark in model.remarks)]
        if self.options.prefix and not prefixes.is_known(self.options.prefix):
            warnings.append(
                f'mergetool knows no program that reads names under "{self.options.prefix}", and would not take it off again'
            )
        warnings += quantised.warnings(self.inputs, self.noise)
        stored = {p.encoding.quant for p in self.first.anatomy.own.values() if p.encoding and p.encoding.quant}
        if stored and self.quantiser is None and self.options.dtype is None:
            warnings.append(
                f"{self.first.name}'s quantised weights become bf16; `quant={stored.pop()}` writes its container"
            )
        if self.quantiser is not None:
            warnings.append(quantised.what(self.anatomy, self.first.name, self.quantiser, self.is_quantised))
        how = IN_FP16.get(self.family.in_fp16(self.first.anatomy))
        if how is not None and self.options.dtype == "fp16":
            warnings.append(
                f"fp16 output: {self.family.name}'s activations overflow in fp16, so that {how}; bf16 is the safe choice"
            )
        return warnings
