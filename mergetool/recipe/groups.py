"""Multipliers by group, resolved against a model. The last setting that selects a part decides its multiplier."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction

from mergetool import arch
from mergetool.arch import Anatomy, Family
from mergetool.checkpoint.names import quoted
from mergetool.errors import PatternError, UsageError
from mergetool.options.multipliers import PRESET, Gradient, Setting, parse_setting


def expand(settings: Sequence[Setting], family: Family) -> tuple[Setting, ...]:
    """Replace every preset in ``settings`` by its own settings.

    Raises UsageError for a preset the family does not have.
    """
    expanded: list[Setting] = []
    for pattern, multiplier in settings:
        if not pattern.startswith(PRESET):
            expanded.append((pattern, multiplier))
            continue
        for text in _preset(pattern.removeprefix(PRESET), family):
            group, value = parse_setting(text)
            assert isinstance(multiplier, Fraction)
            expanded.append((group, value * multiplier))
    return tuple(expanded)


def resolve(settings: Sequence[Setting], anatomy: Anatomy) -> dict[str, Fraction]:
    """The multiplier of every part that a setting selects, by canonical name.

    Raises PatternError for a pattern that selects nothing and for a gradient over what is not two or more numbered blocks of one
    stack, UsageError for an unknown preset.
    """
    chosen: dict[str, Fraction] = {}
    for pattern, multiplier in expand(settings, anatomy.family):
        (names,) = arch.select([pattern], anatomy).values()
        if isinstance(multiplier, Gradient):
            chosen |= _along(multiplier, pattern, names, anatomy.family)
        else:
            chosen |= dict.fromkeys(names, multiplier)
    return chosen


def _preset(name: str, family: Family) -> tuple[str, ...]:
    known = {preset.name: preset.settings for preset in family.presets}
    own = name.lower().replace("_", "-")  # block-weight tools write GRAD_V
    if own in known:
        return known[own]
    if not known:
        raise UsageError(
            f"the {family.name} family has no presets; give the groups themselves, as in `multipliers=ffn=0.5`."
        )
    near = get_close_matches(own, known, n=1)
    hint = f"did you mean {PRESET}{near[0]}" if near else "choose one"
    listed = "; ".join(
        f"{PRESET}{preset.name}" + ("" if preset.kind else f": {', '.join(preset.settings)}")
        for preset in family.presets
    )
    raise UsageError(f"the {family.name} family has no preset {quoted(name)}; {hint} ({listed}).")


def _along(gradient: Gradient, pattern: str, names: Collection[str], family: Family) -> Mapping[str, Fraction]:
    blocks = {name: family.block_of(name) for name in sorted(names)}
    outside = [name for name, block in blocks.items() if block is None]
    if outside:
        raise PatternError(
            f"{quoted(pattern)}={gradient} is a gradient over numbered blocks, but {quoted(outside[0])} is in none "
            f"({len(outside)} such tensors); choose blocks, as in layers={gradient} or layers.attention={gradient}."
        )
    numbered = [block for block in blocks.values() if block is not None]
    stacks = sorted({stack for stack, _ in numbered})
    numbers = sorted({n for _, n in numbered})
    if len(stacks) > 1:
        raise PatternError(
            f"{quoted(pattern)}={gradient} is a gradient over the blocks of one stack, but the pattern selects blocks of "
            f"{', '.join(stacks)}; choose one, as in {stacks[-1]}.*={gradient}."
        )
    if len(numbers) < 2:
        raise PatternError(
            f"{quoted(pattern)}={gradient} is a gradient over two blocks or more, but only {stacks[0]}.{numbers[0]} is "
            "selected; give a number."
        )
    span = numbers[-1] - numbers[0]
    at = {n: gradient.at(Fraction(n - numbers[0], span)) for n in numbers}
    return {name: at[block[1]] for name, block in blocks.items() if block is not None}
