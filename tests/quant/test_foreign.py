"""Files in containers that are not read, by the tensors their programs write, and codes beside what nothing is known of."""

from __future__ import annotations

import pytest

from mergetool.checkpoint.dtypes import BF16, BY_CODE, F8_E4M3, F16, F32, DType
from mergetool.checkpoint.header import Header
from mergetool.errors import DataError
from mergetool.quant.weights import encodings

U8, I8, I32, I64, BOOL = (BY_CODE[code] for code in ("U8", "I8", "I32", "I64", "BOOL"))
E8M0, F4, FNUZ = BY_CODE["F8_E8M0"], BY_CODE["F4"], BY_CODE["F8_E4M3FNUZ"]
Leaves = dict[str, tuple[DType, tuple[int, ...]]]


def examine(leaves: Leaves, module: str = "layers.0.attention.to_q") -> None:
    entries = [("norm.weight", BF16, (8,)), *((f"{module}.{leaf}", *how) for leaf, how in leaves.items())]
    tensors = dict(Header.plan(entries).tensors)
    encodings(tensors, {}, None, read=lambda _: b"", packed={}, source="f")


@pytest.mark.parametrize(
    ("container", "leaves"),
    [
        ("a DFloat11 .DF11.", {"encoded_exponent": (U8, (90,)), "sign_mantissa": (U8, (64,)), "luts": (U8, (3, 256))}),
        ("an HQQ", {"W_q": (U8, (32, 64)), "meta": (U8, (40,))}),
        ("a quanto", {"weight._data": (I8, (8, 8)), "weight._scale": (BF16, (8, 1)), "input_scale": (BF16, ())}),
        ("a quanto", {"weight._data": (F8_E4M3, (8, 8)), "weight._scale": (BF16, (8, 1))}),
        ("a torchao", {"weight.tensor_data": (I8, (8, 8)), "weight.scale": (BF16, (8,))}),
        ("a torchao", {"_weight_qdata": (I8, (8, 8)), "_weight_scale": (BF16, (8,))}),
        ("a torchao", {"weight.tensor_impl.data": (I8, (8, 8)), "weight.tensor_impl.scale": (BF16, (8,))}),
        ("a GPTQ or AWQ", {"qweight": (I32, (8, 1)), "qzeros": (I32, (1, 1)), "scales": (F16, (1, 8))}),
        ("a nunchaku SVDQuant", {"qweight": (I8, (8, 4)), "wscales": (BF16, (1, 8)), "proj_down": (BF16, (8, 2))}),
        ("a compressed-tensors", {"weight_packed": (I32, (8, 1)), "weight_scale": (BF16, (8, 1))}),
        ("an SDNQ", {"weight": (I8, (8, 8)), "scale": (BF16, (8, 1)), "svd_up": (BF16, (8, 2))}),
        ("an SDNQ", {"weight": (U8, (8, 8)), "scale": (BF16, (8, 1)), "zero_point": (BF16, (8, 1))}),
    ],
)
def test_a_container_is_named_and_refused_with_a_way_out(container: str, leaves: Leaves) -> None:
    with pytest.raises(DataError, match=rf'^"f" is {container} file.* \(tensor .*; use the unquantised original'):
        examine(leaves)


@pytest.mark.parametrize(
    ("dtype", "leaf", "beside"),
    [
        *(
            (dtype, "weight", beside)
            for dtype in (F8_E4M3, I8, U8, FNUZ, F4)
            for beside in ("scales", "weight_amax", "q")
        ),
        (I8, "weight", "scale"),
        (F8_E4M3, "weight", "weight.multiplier"),
        (F8_E4M3, "float8_data", "scale_reciprocal"),
        (F8_E4M3, "in_proj_weight", "in_proj_weight_scale"),
        (U8, "packed", "codebook_of_it"),
        (I8, "data", "step"),
    ],
)
def test_codes_beside_something_unknown_are_refused_and_both_are_named(dtype: DType, leaf: str, beside: str) -> None:
    with pytest.raises(DataError) as caught:
        examine({leaf: (dtype, (8, 8)), beside: (F32, (8,))})
    assert f'.{leaf}" is {dtype.code} beside "layers.0.attention.to_q.{beside}"' in str(caught.value)
    assert "use the unquantised original" in str(caught.value)


def test_one_dimension_of_codes_in_place_of_a_weight_is_refused() -> None:
    with pytest.raises(DataError, match="is not understood here"):
        examine({"stream": (U8, (900,)), "table": (F32, (16,)), "bias": (BF16, (8,))})


@pytest.mark.parametrize(
    "leaves",
    [
        {"weight": (F8_E4M3, (8, 8)), "bias": (F8_E4M3, (8,))},
        {"weight": (F8_E4M3, (8, 8)), "e_score_correction_bias": (F32, (8,))},
        {"weight": (BF16, (8, 8)), "scale": (F32, (8,)), "step": (F32, ())},
        {"scale_shift_table": (F8_E4M3, (6, 8)), "table_b": (F8_E4M3, (6, 8))},
        {"in_proj_weight": (F8_E4M3, (24, 8)), "in_proj_bias": (F8_E4M3, (24,)), "out_proj.weight": (F8_E4M3, (8, 8))},
        {"position_ids": (I64, (1, 77)), "position_embedding": (BF16, (77, 8))},
        {"weight": (F8_E4M3, (8, 8)), "num_batches_tracked": (I64, ()), "running_mean": (F32, (8,))},
        {"mask": (BOOL, (8, 8)), "table": (F32, (8,))},
        {"flag": (U8, ()), "table": (F32, (8,))},
        {"chars": (I8, (16,)), "bytes": (U8, (16,)), "ids": (I64, (16,)), "mask": (BOOL, (16,))},
        {"f4": (F4, (8,)), "scale": (E8M0, (4,)), "flag": (BOOL, (1,)), "empty": (F32, (0, 3))},
    ],
)
def test_what_is_no_code_is_left_alone(leaves: Leaves) -> None:
    examine(leaves)
