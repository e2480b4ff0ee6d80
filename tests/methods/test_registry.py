"""The register: what a function must say to be a method, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Annotated, Literal

import pytest
import torch
from torch import Tensor

from mergetool import methods
from mergetool.engine.job import open_merge
from mergetool.errors import UsageError
from mergetool.methods import Parameter, Site, registry
from mergetool.methods.registry import Range, Text
from mergetool.recipe.expression import parse


@pytest.fixture(autouse=True)
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", dict(methods.methods()))
    return


def two(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    share: Annotated[float, Range(0, 1, "how much")] = 0.5,
    steps: Annotated[int, Range(1, text="how often")] = 3,
    weights: Annotated[tuple[float, ...], Text("one an argument")] = (),
    kind: Annotated[Literal["up", "down"], Text("which way")] = "up",
    exact: Annotated[bool, Text("whether exactly")] = False,
) -> Tensor:
    """Do something
    with differences.

    Formula: share * d1,
        and so on
    Source: nowhere

    Formula: what stands in a later paragraph is not one.
    """
    return tensors[0] * share * steps


def test_a_method_is_what_its_signature_and_docstring_say() -> None:
    registry.method(takes="deltas", least=2)(two)
    found = methods.find("two")
    assert (found.summary, found.formula, found.source) == (
        "Do something with differences.",
        "share * d1, and so on",
        "nowhere",
    )
    assert found.signature == "two(delta1, delta2, ..., share=0.5, steps=3, weights=[...], kind='up', exact=False)"
    assert found["steps"] == Parameter("steps", int, 3, 1, float("inf"), (), "how often")
    assert [p.wanted() for p in found.parameters] == [
        "a number from 0 to 1",
        "a whole number from 1",
        "a list of numbers, one an argument, as in [1, 0.5]",
        "'up' or 'down'",
        "True or False",
    ]


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("share", [Fraction(0), Fraction(1), Fraction(1, 3)], [Fraction(-1, 100), Fraction(101, 100), True, "1"]),
        ("steps", [Fraction(1), Fraction(10**9)], [Fraction(0), Fraction(3, 2), True]),
        ("weights", [(Fraction(1), Fraction(-2))], [(Fraction(1),), Fraction(1), (), (Fraction(2**128), Fraction(1))]),
        ("kind", ["up", "down"], ["left", Fraction(1), True]),
        ("exact", [True, False], [Fraction(1), "True"]),
    ],
)
def test_parameters_accept_what_they_say(name: str, accepted: list[object], refused: list[object]) -> None:
    registry.method(takes="deltas", least=2)(two)
    parameter = methods.find("two")[name]
    assert all(parameter.accepts(value, 2) for value in accepted)  # type: ignore[arg-type]
    assert not any(parameter.accepts(value, 2) for value in refused)  # type: ignore[arg-type]


def test_numbers_arrive_as_the_types_of_the_signature() -> None:
    seen: dict[str, object] = {}

    def spy(tensors: Sequence[Tensor], site: Site, *, share: float = 0.5, steps: int = 1) -> Tensor:
        """Say.

        Formula: x
        Source: y
        """
        seen.update(share=share, steps=steps, site=site)
        return tensors[0]

    registry.method(takes="any")(spy)
    methods.find("spy").apply([torch.zeros(1)], Site("w"), {"share": Fraction(1, 4), "steps": Fraction(2)})
    assert (seen, type(seen["steps"])) == ({"share": 0.25, "steps": 2, "site": Site("w")}, int)


def test_a_method_is_registered_once() -> None:
    registry.method(takes="deltas")(two)
    with pytest.raises(TypeError, match='"two" is registered twice'):
        registry.method(takes="deltas")(two)


def test_a_method_without_its_source_is_refused() -> None:
    def mute(tensors: Sequence[Tensor], site: Site) -> Tensor:
        """Do something."""
        return tensors[0]

    with pytest.raises(TypeError, match='"mute" does not say its formula, source'):
        registry.method(takes="any")(mute)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("tensors, site, *, base=0.5", "base"),
        ("tensors, site, *, share: float", "no default"),
        ("tensors, site, *, share: list = None", "no usable type"),
        ("tensors, *, share: float = 1.0", r"not a function \(tensors, site"),
        ("tensors, site, share: float = 1.0", r"not a function \(tensors, site"),
    ],
)
def test_a_signature_that_an_expression_cannot_call_is_refused(parameters: str, words: str) -> None:
    made: dict[str, object] = {}
    exec(
        f"def odd({parameters.replace('base=', 'base: float = ')}):\n  'S.\\n\\n  Formula: f\\n  Source: s\\n  '\n",
        made,
    )
    with pytest.raises(TypeError, match=words):
        registry.method(takes="any")(made["odd"])  # type: ignore[arg-type]


def test_the_keys_of_random_numbers_are_shared_by_no_two_parameters_arguments_or_seeds() -> None:
    keys = {Site(part).key(seed, argument) for part in ("a", "a1", "b") for seed in (0, 1, 10) for argument in range(3)}
    assert len(keys) == 27


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match='no merge method "slurp" is registered; did you mean "slerp"'):
        methods.find("slurp")


@pytest.mark.parametrize("name", sorted(methods.methods()))
def test_every_example_can_be_planned(name: str) -> None:
    with open_merge(methods.find(name).example) as plan:
        assert plan.tensors


def test_affine_methods_are_part_of_the_expressions_arithmetic() -> None:
    assert not list(parse("linear(a, weighted_sum(b, c), add_difference(d, e, f))").graph.calls())
    assert methods.find("task_arithmetic").factors(2, weights=(Fraction(2), Fraction(1)), scale=Fraction(3)) == [6, 3]  # type: ignore[misc]
    assert methods.find("linear").factors(3, normalize=False) == [1, 1, 1]  # type: ignore[misc]
    assert methods.find("weighted_sum").factors(2, alpha=Fraction(3, 10)) == (Fraction(7, 10), Fraction(3, 10))  # type: ignore[misc]
