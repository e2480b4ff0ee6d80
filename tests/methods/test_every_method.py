"""What every registered method promises, whatever it computes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mergetool import methods
from mergetool.methods import Method, Site
from tests.methods.parity.case import SITE, apply, tensors

ALL = [method for method in methods.methods().values() if method.function is not None]
each = pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)


def given(method: Method, shape: tuple[int, ...] = (12, 9)) -> list[Tensor]:
    kind = "deltas" if method.takes == "deltas" else "models"
    return tensors(kind, max(method.least, min(3, method.most or 3)), shape)


def call(method: Method, arguments: list[Tensor], site: Site = SITE) -> Tensor:
    assert method.function is not None
    return method.function([tensor.clone() for tensor in arguments], site)


@each
@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1), (5, 1), (1, 5), (4, 3, 2, 2), (0, 3), (3, 0)])
def test_any_shape_gives_that_shape_in_float32(method: Method, shape: tuple[int, ...]) -> None:
    result = call(method, given(method, shape))
    assert (result.shape, result.dtype) == (shape, torch.float32)
    assert result.isfinite().all()


@each
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e-30, 1e30])
def test_equal_constants_give_a_finite_result(method: Method, value: float) -> None:
    assert call(method, [torch.full((6, 5), value)] * len(given(method))).isfinite().all()


@each
def test_zeros_give_zeros(method: Method) -> None:
    assert not call(method, [torch.zeros(6, 5)] * len(given(method))).any()


@each
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_passed_on(method: Method, value: float) -> None:
    for k in range(len(given(method))):
        arguments = given(method)
        arguments[k][3, 4] = value
        assert not call(method, arguments).isfinite().all(), f"argument {k + 1}"


@each
def test_the_same_call_gives_the_same_bytes_and_a_seed_other_ones(method: Method) -> None:
    arguments = given(method, (40, 30))
    result = call(method, arguments)
    assert torch.equal(call(method, arguments), result)
    random = any(parameter.name == "seed" for parameter in method.parameters)
    assert torch.equal(call(method, arguments, Site("another.weight")), result) == (not random)
    if random:
        assert not torch.equal(apply(method, [tensor.clone() for tensor in arguments], {"seed": 1}), result)


@pytest.mark.gpu
@each
def test_a_gpu_gives_the_cpus_values(method: Method) -> None:
    """To float32's accuracy of sums; which elements are kept, at random or by their size, is the same to an element or two."""
    arguments = given(method, (512, 300))
    wanted = call(method, arguments)
    found = call(method, [tensor.cuda() for tensor in arguments])
    assert found.is_cuda
    assert float((found.cpu() - wanted).norm() / wanted.norm()) < 1e-4
    assert int((found.cpu() - wanted).abs().gt(1e-3 * wanted.abs().max()).sum()) <= 2


@each
def test_defaults_are_values_that_the_parameter_takes(method: Method) -> None:
    for parameter in method.parameters:
        assert parameter.text
        if parameter.kind is float:
            assert parameter.low <= parameter.default <= parameter.high


def test_methods_hold_no_more_memory_than_they_say() -> None:
    command = [sys.executable, "-m", "tests.methods.footprint", "1024", "2048"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert set(found) == {method.name for method in ALL}
    for name, (held, _) in found.items():
        # and some blocks of a fixed size and pages of libraries: 0.9 of so small a part
        assert held <= methods.find(name).buffers(3) + 1, name
