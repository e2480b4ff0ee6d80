"""Group the outputs of a recipe into passes.

An output comes after those that it uses; merges of the same models share a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mergetool.recipe.file import RecipeOutput
from mergetool.recipe.schema import MergeOutput


def passes(
    outputs: Sequence[RecipeOutput], place: Callable[[RecipeOutput], frozenset[str]]
) -> list[list[RecipeOutput]]:
    """Put the outputs into passes, each after the outputs that it uses.

    Merges that can be made at the same time, have a model in common and are sharded alike are one pass; ``place`` gives the models of an
    output. A LoRA is a pass of its own.
    """
    depth: dict[int, int] = {}
    for output in outputs:  # a recipe has every output after those that it uses
        depth[id(output)] = 1 + max((depth.get(id(used), -1) for used in output.earlier), default=-1)
    made: list[list[RecipeOutput]] = []
    for level in range(max(depth.values(), default=-1) + 1):
        at_level = [output for output in outputs if depth[id(output)] == level]
        made += _joined([output for output in at_level if isinstance(output.spec, MergeOutput)], place)
        made += [[output] for output in at_level if not isinstance(output.spec, MergeOutput)]
    return made


def _joined(
    merges: Sequence[RecipeOutput], place: Callable[[RecipeOutput], frozenset[str]]
) -> list[list[RecipeOutput]]:
    """Merges in groups that have models in common, directly or through others of the group."""
    groups: list[tuple[set[str], object, list[RecipeOutput]]] = []
    for output in merges:
        assert isinstance(output.spec, MergeOutput)
        models, shards, members = set(place(output)), output.spec.shard_size, [output]
        apart = []
        for group in groups:
            if group[1] == shards and group[0] & models:
                models |= group[0]
                members = group[2] + members
            else:
                apart.append(group)
        groups = [*apart, (models, shards, members)]
    return [members for _, _, members in groups]
