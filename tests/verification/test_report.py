"""The HTML page: whole in one file, true to the numbers, and safe with hostile names."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergetool.comparison import page as pages
from mergetool.comparison.energies import Distance, Energies
from mergetool.errors import OutputError
from mergetool.lab.world import SCENES, Placing, render
from mergetool.sampler.request import Refinement, Shot, Stage
from mergetool.sampler.session import MadePicture
from mergetool.verification import report
from mergetool.verification.looks import Look
from mergetool.verification.pictures import PicturesReport, judge, observe
from mergetool.verification.weights import WeightsReport

PROMPTS = [scene.prompt for scene in SCENES[:3]]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Text of every element, and every address that an attribute holds; fails on tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.images: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"] or "")
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def looked() -> PicturesReport:
    shots = tuple(Shot(prompt, seed) for seed, prompt in enumerate(PROMPTS))
    look = Look(shots, (64, 64), Stage("out", 30, 3.0, 3.0), (Refinement("turbo"),))
    made = [MadePicture(render(scene, Placing(32, 32, 18)), {"seed": 1}) for scene in SCENES[:3]]
    columns = tuple(
        observe(model, label, made, PROMPTS) for model in ("alkahest", "out") for label in (model, f"{model} + 0.15")
    )
    return PicturesReport(look, columns, judge(columns, "out"))


def weights(**damage: object) -> WeightsReport:
    found = [
        Distance("layers.0.attention.to_q.weight", frozenset({"layers", "q"}), Energies(1, base=100.0, delta=1.0)),
        Distance("noise_refiner.0.attention.to_q.weight", frozenset({"refiner", "q"}), Energies(1, base=100.0)),
    ]
    made = WeightsReport("alkahest + 2*(a - b)", "alkahest", {"alkahest": "/models/alkahest"}, merged=5, kept=2)
    made.distances = {"alkahest": found}
    for name, value in damage.items():
        setattr(made, name, value)
    return made


def test_a_page_needs_no_other_file() -> None:
    page = Page(report.render("out.safetensors", weights(), looked()))
    assert page.addresses
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert "script" not in page.tags


def test_every_shot_shows_each_model_and_stage_with_the_merge_first() -> None:
    page = Page(report.render("out.safetensors", weights(), looked()))
    captions = [text.strip() for text in page.texts if re.fullmatch(r"(out|alkahest)( \+ 0\.15)?", text.strip())]
    assert captions[:4] == ["out", "out + 0.15", "alkahest", "alkahest + 0.15"]
    assert len(page.images) == 3 * 4


def test_the_pictures_of_the_page_are_those_that_were_made() -> None:
    page = Page(report.render("out.safetensors", weights(), looked()))
    shown = [Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) for address in page.images[::4]]
    for picture, made in zip(shown, looked().merge_first[0].pictures, strict=True):
        assert np.array_equal(np.asarray(picture.convert("RGB")), made)


def test_limits_are_words_and_shares_are_percent() -> None:
    texts = " ".join(Page(report.render("out.safetensors", weights(), looked())).texts)
    assert re.search(r"0 of 3 pictures without structure\s+\(at most 25%\)", texts)
    assert re.search(r"100% of the pictures show their prompt; 100% of the best parent's\s+\(at least 75%\)", texts)


@pytest.mark.parametrize(
    ("damage", "banner"),
    [({}, "passed"), ({"differing": {"layers.0.attention.to_q.weight": 7}}, "failed"), ({"changed": ["a"]}, "failed")],
)
def test_the_banner_and_the_damage_are_those_of_the_check(damage: dict[str, object], banner: str) -> None:
    page = Page(report.render("out.safetensors", weights(**damage), looked()))
    assert banner in page.texts
    for names in damage.values():
        assert any(name in text for name in names for text in page.texts)  # type: ignore[attr-defined]


def test_numbers_of_the_page_are_those_measured() -> None:
    texts = " ".join(Page(report.render("out.safetensors", weights(), looked())).texts)
    assert re.search(r"alkahest\s+7\.07 %\s+0\s+10 %", texts)  # sqrt(1 / 200), the refiner, the layers
    assert "0 of 3 pictures without structure" in texts
    assert "from sigma 0.353" in texts.replace("\n", " ")


def test_in_the_heat_map_a_block_without_change_is_grey_and_others_are_not() -> None:
    page = report.render("out.safetensors", weights(), None)
    cells = re.findall(r'<path d="[^"]*"[^>]*style="fill: (#[0-9a-f]{6}); stroke: #ffffff', page)
    assert len(cells) == 2
    assert cells.count("#d9d9d9") == 1


def test_without_pictures_the_page_says_why() -> None:
    page = Page(report.render("out.safetensors", weights(), None, left_out="there is no GPU"))
    assert any("No pictures: there is no GPU" in text for text in page.texts)


def test_names_cannot_become_markup() -> None:
    hostile = "<script>alert(1)</script>"
    page = Page(report.render(hostile, weights(expression=hostile, missing=[hostile]), looked()))
    assert "script" not in page.tags
    assert page.texts.count(hostile) == 3  # the heading, the expression, and the list of missing tensors


def test_the_same_check_gives_the_same_page() -> None:
    assert report.render("out", weights(), looked()) == report.render("out", weights(), looked())


def test_a_place_where_no_page_can_be_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("mine")
    for path in (tmp_path, tmp_path / "there.html", tmp_path / "nothing" / "report.html"):
        with pytest.raises(OutputError):
            pages.require_target(path, overwrite=False)
    pages.require_target(tmp_path / "there.html", overwrite=True)


def test_where_nothing_was_judged_the_badge_says_so() -> None:
    measured = WeightsReport("", "someone", {}, kept=7, derived=False)
    page = Page(report.render("someone.safetensors", measured, None, left_out="there is no GPU"))
    assert "not judged" in page.texts
    assert "passed" not in page.texts
    assert any("the file has no recipe" in text for text in page.texts)


def test_a_file_without_recipe_that_holds_nan_has_failed() -> None:
    measured = WeightsReport("", "someone", {}, kept=7, derived=False, non_finite={"layers.0.w": 3})
    assert "failed" in Page(report.render("someone.safetensors", measured, None)).texts
