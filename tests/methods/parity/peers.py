"""The methods of mergekit and sd-mecha, called with plain tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from unittest import mock

import sd_mecha
import torch
from mergekit import merge_methods
from mergekit.merge_methods.base import ParameterScope, TensorGroup
from torch import Tensor

from mergetool.ops.reductions import uniform
from tests.methods.parity.case import SITE, Theirs


def mergekit(name: str, *, base: Literal["zero", "first", ""] = "", random: bool = False, **parameters: Any) -> Theirs:
    """A registered method of mergekit. ``base`` is the model that its differences are taken from: zeros, which makes its
    arguments the differences and its result one, or the first argument. A parameter of one value an argument may be given as one number for all,
    or as a list. With ``random`` it draws the random numbers that ours draw with seed 0 (see ``drawing_ours``).
    """
    method = merge_methods.get(name)
    parameters = {key.removesuffix("_"): value for key, value in parameters.items()}  # lambda is a word of Python
    per_argument = {each.name for each in method.spec.parameters if each.scope != ParameterScope.SHARED}

    def call(given: list[Tensor]) -> Tensor:
        tensors = [torch.zeros_like(given[0]), *given] if base == "zero" else given
        ids = range(1, len(tensors)) if base else range(len(tensors))
        values = {key: _each(value, ids) if key in per_argument else value for key, value in parameters.items()}
        group = TensorGroup.from_tensors(tensors, base_index=0 if base else None)
        with drawing_ours(random):
            result: Tensor = method([group], parameters=values)[0]
        return result

    return Theirs("mergekit", _text(name, parameters), call)


def _each(value: Any, ids: Sequence[int]) -> dict[int, Any]:
    return dict(zip(ids, value if isinstance(value, Sequence) else [value] * len(ids), strict=True))


def mecha(name: str, *, random: bool = False, double: bool = False, **parameters: Any) -> Theirs:
    """A built-in method of sd-mecha, by the name of its function; ``random`` as with mergekit's; with ``double`` in float64.

    Numbers become tensors where it declares them so, and a parameter of a model is handed over as a model of one parameter where it wants one.
    """
    function: Callable[..., Tensor] = sd_mecha.extensions.merge_methods.resolve(name).__wrapped__
    arguments = inspect.signature(function).parameters
    declared = {key: argument.annotation.data.interface for key, argument in arguments.items() if key != "kwargs"}
    key = {"key": SITE.part} if "kwargs" in arguments else {}

    def call(given: list[Tensor]) -> Tensor:
        values = {
            name: torch.tensor(value) if declared[name] is Tensor else value for name, value in parameters.items()
        }
        given = [tensor.double() for tensor in given] if double else given
        models = [{SITE.part: tensor} for tensor in given] if key else given
        with drawing_ours(random):
            return function(*models, **values, **key)

    return Theirs("sd-mecha", _text(name, parameters) + " in float64" * double, call)


def _text(name: str, parameters: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in parameters.items())})"


@contextmanager
def drawing_ours(active: bool = True) -> Iterator[None]:
    """Within, the k-th call of torch.bernoulli, or of numpy's binomial with n=1, draws from our random numbers of the k-th argument and seed 0."""
    drawn = 0

    def keep(probabilities: Any, shape: torch.Size | tuple[int, ...]) -> Tensor:
        nonlocal drawn
        drawn += 1
        draws = uniform(SITE.key(0, drawn - 1), shape, torch.device("cpu"))
        return draws.lt(probabilities)

    class Generator:
        def binomial(self, n: int, p: float, size: tuple[int, ...]) -> Any:
            assert n == 1
            return keep(p, size).numpy()

    def bernoulli(given: Tensor, **_: object) -> Tensor:
        return keep(given, given.shape).to(given.dtype)

    if not active:
        yield
        return
    with mock.patch("torch.bernoulli", bernoulli), mock.patch("numpy.random.default_rng", return_value=Generator()):
        yield
