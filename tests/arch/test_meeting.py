"""Whether two models meet: what has no counterpart is said where it is much, and refused where nothing would be merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from mergetool.arch import Anatomy, meeting, recognise
from mergetool.checkpoint.dtypes import BF16, BY_CODE, DType
from mergetool.errors import FamilyError
from tests.arch.tables import table, z_image

BLOCKS = {f"blocks.{n}.attn.to_q.weight": (8, 8) for n in range(4)} | {
    f"blocks.{n}.norm.weight": (8,) for n in range(4)
}


@dataclass(frozen=True)
class Model:
    name: str
    anatomy: Anatomy


def model(name: str, shapes: Mapping[str, tuple[int, ...]], dtype: DType = BF16) -> Model:
    return Model(name, recognise(table(shapes, dtype=dtype), source=name))


def refusal(first: Model, other: Model, chosen: list[str] | None = None) -> str:
    with pytest.raises(FamilyError) as caught:
        meeting.check(first, other, chosen)
    return str(caught.value)


def renamed(*old: str) -> dict[str, tuple[int, ...]]:
    return {name.replace(*old): shape for name, shape in BLOCKS.items()}


def test_equal_names_meet_without_a_word() -> None:
    assert meeting.check(model("a", BLOCKS), model("b", BLOCKS)) == []


def test_a_block_of_a_model_that_the_other_lacks_is_said_with_its_share() -> None:
    less = {name: shape for name, shape in BLOCKS.items() if not name.startswith("blocks.3.")}
    (said,) = meeting.check(model("a", BLOCKS), model("b", less))
    assert said.startswith("25 % of the parameters of a are not in b")
    (said,) = meeting.check(model("b", less), model("a", BLOCKS))
    assert said.startswith("25 % of the parameters of a are not in b and are left out")


def test_a_tensor_of_little_size_is_not_worth_a_warning() -> None:
    assert (
        meeting.check(model("a", BLOCKS | {"norm_final.weight": (2,)}), model("b", BLOCKS | {"extra.bias": (2,)})) == []
    )


def test_models_without_a_name_in_common_are_refused_with_one_of_each() -> None:
    said = refusal(model("a", BLOCKS), model("b", renamed("blocks", "layers")))
    assert '"blocks.0.attn.to_q.weight"' in said
    assert '"layers.0.attn.to_q.weight"' in said


def test_norms_alone_are_not_enough() -> None:
    fused = {f"blocks.{n}.attn.qkv.weight": (24, 8) for n in range(4)} | {
        f"blocks.{n}.norm.weight": (8,) for n in range(4)
    }
    assert "two layouts of one model" in refusal(model("a", BLOCKS), model("b", fused))


def test_as_much_on_either_side_looks_like_other_names_of_the_same() -> None:
    wide = BLOCKS | {"final.weight": (64, 64)}
    said = refusal(model("a", wide), model("b", renamed("to_q", "q") | {"final.weight": (64, 64)}))
    assert "94 % of the parameters" in said
    assert '`exclude="blocks.0.attn.to_q.weight"' in said


def test_what_is_left_out_needs_no_counterpart() -> None:
    wide = BLOCKS | {"final.weight": (64, 64)}
    other = model("b", renamed("to_q", "q") | {"final.weight": (64, 64)})
    said = meeting.check(model("a", wide), other, [name for name in wide if "to_q" not in name])
    assert len(said) == 1
    assert "of the parameters of b are not in a" in said[0]


def test_integers_do_not_meet() -> None:
    said = refusal(model("a", BLOCKS), model("b", BLOCKS, BY_CODE["I8"]))
    assert "none of the 8 tensors" in said


def test_nothing_of_what_is_wanted_is_refused() -> None:
    said = refusal(model("a", BLOCKS | {"x.weight": (2, 2)}), model("b", BLOCKS), ["x.weight"])
    assert '"x.weight" is not' in said


def test_families_are_named_with_a_tensor_of_each() -> None:
    z = Model("z", recognise(z_image(), source="z"))
    with pytest.raises(
        FamilyError,
        match=r'a is a generic model \(tensor "blocks.0.attn.to_q.weight"\), z is a Z-Image model \(tensor "',
    ):
        meeting.check_families(model("a", BLOCKS), z)


def test_named_families_differ_and_a_piece_of_one_meets_it() -> None:
    krea = model("k", {"txtfusion.projector.weight": (1, 12), "blocks.0.attn.wq.weight": (8, 8)})
    ace = model("a", {"genre_embedder.weight": (8, 8), "lyric_proj.weight": (8, 8)})
    with pytest.raises(FamilyError, match=r"k is a Krea 2 model \(.*\), a is an ACE-Step model \("):
        meeting.check_families(krea, ace)
    meeting.check_families(krea, model("p", {"blocks.0.attn.wq.weight": (8, 8)}))


def test_a_lora_has_to_change_something_of_what_is_merged() -> None:
    first, lora = model("a", BLOCKS), model("l", {"blocks.0.attn.to_q.weight": (8, 8)})
    meeting.check_change(first, lora, [*BLOCKS], ())
    with pytest.raises(FamilyError, match="changes nothing of a that is to be merged"):
        meeting.check_change(first, lora, ["blocks.1.attn.to_q.weight"], ())
    none = Model("l", Anatomy(first.anatomy.family, "plain", "", {}))
    with pytest.raises(FamilyError, match=r'no key of the LoRA l is of a module of a: "x.lora_A" \(why\)'):
        meeting.check_change(first, none, [*BLOCKS], (("x.lora_A", "why"),))
