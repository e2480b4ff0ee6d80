"""Term order decides nothing: one algebra gives the same tensor bytes, and the same model is its anchor."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine import job
from mergetool.errors import UsageError
from mergetool.options.merging import MergeOptions
from mergetool.options.multipliers import parse_setting
from mergetool.recipe import provenance
from tests.families import checkpoint

NAMES = ("alk", "a", "b", "c", "d")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small fine-tunes of one base."""
    folder = tmp_path_factory.mktemp("anchor")
    for seed, name in enumerate(NAMES):
        checkpoint(folder / f"{name}.safetensors", variant=seed)
    return folder


@pytest.fixture(autouse=True)
def _here(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    (models / "mergetool.toml").write_text("[models]\n" + "".join(f'{n} = "{n}.safetensors"\n' for n in NAMES))


def merged(text: str, **options: object) -> tuple[str, str]:
    """The anchor and a digest of all tensors, names and bytes, of what ``text`` merges to."""
    output = Path("out.safetensors")
    with job.open_merge(text, MergeOptions(**options)) as plan:  # type: ignore[arg-type]
        job.run_merge(plan, output, overwrite=True, measure="off")
    with Checkpoint.open(output) as opened:
        digest = hashlib.sha256()
        for name in opened.tensors:
            digest.update(name.encode() + opened.read(name))
        return str(provenance.read(opened.metadata, "out").anchor), digest.hexdigest()


@dataclass
class Written:
    """An affine expression as differences around an anchor, and ways to write it that must not matter."""

    anchor: str
    differences: list[tuple[str, str, str]]  # factor, added, subtracted

    @classmethod
    def drawn(cls, dice: random.Random) -> Written:
        others = dice.sample(NAMES[1:], 4)
        pairs = [(others[0], others[1]), (others[2], others[3]), (others[1], others[2])]
        factors = ["20", "1.5", "0.3", "171.1", "1", "0.25", "7/3"]
        return cls("alk", [(dice.choice(factors), *pair) for pair in pairs[: dice.randint(1, 3)]])

    def spelled(self, dice: random.Random) -> str:
        """The terms in any order, each as k*(x - y), (x - y)*k, -k*(y - x) or -(k*(y - x)), some in parentheses of their own."""
        terms = [self.anchor, *(self._difference(dice, *each) for each in self.differences)]
        dice.shuffle(terms)
        if len(terms) > 2 and dice.random() < 0.4:
            terms = [terms[0], f"+ ({self._joined(terms[1:])})"]
        return self._joined(terms)

    @staticmethod
    def _joined(terms: list[str]) -> str:
        text = " ".join(term if term[0] in "+-" else f"+ {term}" for term in terms)
        return text.removeprefix("+ ")

    @staticmethod
    def _difference(dice: random.Random, factor: str, x: str, y: str) -> str:
        ways = (
            f"{factor}*({x} - {y})",
            f"({x} - {y})*({factor})",
            f"- {factor}*({y} - {x})",
            f"- (({y} - {x})*({factor}))",
        )
        return dice.choice(ways)


def spellings() -> Iterator[tuple[int, list[str]]]:
    """Fifty algebras, each in four spellings."""
    dice = random.Random(5)
    for number in range(50):
        algebra = Written.drawn(dice)
        yield number, [algebra.spelled(dice) for _ in range(4)]


def test_two_hundred_expressions_in_any_order_give_the_bytes_of_their_algebra() -> None:
    differing = []
    for _, texts in spellings():
        found = {merged(text, protect=("refiner",)) for text in texts}
        if len(found) != 1 or {anchor for anchor, _ in found} != {"alk"}:
            differing.append(texts)
    assert differing == []


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("alk + 20*a - 20*b", "alk + 20*(a - b)"),
        ("20*a - 20*b + alk", "alk + 20*(a - b)"),
        ("alk + (1.5*(a - b) + 20*(c - d))", "20*(c - d) + alk + 1.5*(a - b)"),
        ("0.7*a + 0.3*b", "0.3*b + 0.7*a"),
        ("a/4 + b/4 + c/4 + d/4", "d/4 + 0.25*c + b/4 + a/4"),
        ("a + b - c", "b - c + a"),
        ("ties(a, b, base=c) + 2*(alk - d)", "2*(alk - d) + ties(a, b, base=c)"),
        ("(alk + a - b) + 2*(c - d)", "2*(c - d) + (a - b + alk)"),
    ],
)
def test_rewritings_that_hold(text: str, same: str) -> None:
    assert merged(text)[1] == merged(same)[1]


def test_what_a_file_is_called_decides_nothing() -> None:
    before = merged("alk + 1.5*(a - b) + 20*(c - d)")[1]
    Path("mergetool.toml").write_text(
        '[models]\nz9 = "alk.safetensors"\nq = "a.safetensors"\nb = "b.safetensors"\na = "c.safetensors"\nd = "d.safetensors"\n'
    )
    assert merged("z9 + 1.5*(q - b) + 20*(a - d)")[1] == before


def test_protected_tensors_are_the_anchors_wherever_it_stands() -> None:
    merged("(a - b)*1.5 + alk", protect=("refiner",))
    found, kept = load_file("out.safetensors"), load_file("alk.safetensors")
    assert all(torch.equal(found[name], kept[name]) for name in kept if "refiner" in name)


def test_which_of_two_is_the_anchor_is_asked_where_tensors_would_be_kept_from_it() -> None:
    with pytest.raises(UsageError, match=r'a change of a or of b, and .*refiner.* `keep_from="a"` or `keep_from="b"`'):
        merged("0.7*a + 0.3*b", protect=("refiner",))


def test_from_names_the_anchor() -> None:
    assert merged("0.7*a + 0.3*b", protect=("refiner",), keep_from="b")[0] == "b"
    found, kept = load_file("out.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(found[name], kept[name]) for name in kept if "refiner" in name)


def test_set_asks_which_change_it_scales() -> None:
    with pytest.raises(UsageError, match="`multipliers` scales the change"):
        merged("a + b - c", multipliers=(parse_setting("layers=0.5"),))


def test_dtypes_of_two_candidates_that_differ_are_asked_about() -> None:
    save_file({name: value.float() for name, value in load_file("b.safetensors").items()}, "wide.safetensors")
    with pytest.raises(UsageError, match="would be bf16 with one and fp32 with the other"):
        merged("0.7*a + 0.3*'wide.safetensors'")


def test_kept_tensors_that_are_equal_in_both_need_no_answer() -> None:
    tensors, a = load_file("b.safetensors"), load_file("a.safetensors")
    save_file({name: a[name] if "refiner" in name else value for name, value in tensors.items()}, "sister.safetensors")
    assert merged("0.7*a + 0.3*'sister.safetensors'", protect=("refiner",))[0] == "a"


def test_the_recipe_names_the_anchor_and_what_was_computed() -> None:
    merged("20*(c - d) + alk")
    with safe_open("out.safetensors", "pt") as opened:
        recipe = json.loads(opened.metadata()["mergetool.recipe"])
    assert recipe["anchor"] == "alk"
    assert recipe["expression"] == "alk + 20*(c - d)"
