"""Readings are kept and made once; intervals, the decision and verify's refusals have known answers."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from mergetool.verification import images
from training import models
from training.claims import __main__ as command
from training.claims import bench as benches
from training.claims import drawings, tables
from training.claims.bench import Bench
from training.claims.drawings import CARRIERS, PLAIN, Drawing, Mix, Way, carried, scenes
from training.claims.intervals import decide, difference, interval
from training.claims.verdicts import Looked, refusals
from training.recipes import SHIPPED
from training.world import SIZES, Scene, place, render

# ---- intervals and the decision


@pytest.mark.parametrize(("right", "count"), [(100, 200), (180, 200), (12, 200), (45, 50)])
def test_the_interval_of_a_share_is_that_of_the_binomial(right: int, count: int) -> None:
    """Drawing pictures with replacement draws from a binomial, whose quantiles scipy knows."""
    found = interval(np.arange(count) < right)
    low, high = stats.binom.ppf([0.025, 0.975], count, right / count) / count
    assert found.mean == right / count
    assert abs(found.low - low) <= 1 / count
    assert abs(found.high - high) <= 1 / count


def test_a_difference_is_taken_picture_by_picture() -> None:
    """Nine pictures that only one draws, whatever both draw: the interval is that of nine of 100, not that of two shares near a half."""
    one = np.arange(100) < 55
    other = np.arange(100) < 46
    found = difference(one, other)
    low, high = stats.binom.ppf([0.025, 0.975], 100, 0.09) / 100
    assert found.mean == pytest.approx(0.09)
    assert abs(found.low - low) <= 0.01
    assert abs(found.high - high) <= 0.01
    assert difference(one, one) == interval(np.zeros(100))


def halves(chosen: int, counted: int) -> np.ndarray:
    """Of 200 pictures so many right in the half that chooses and in the half that counts."""
    return np.concatenate([np.arange(100) < chosen, np.arange(100) < counted])


@pytest.mark.parametrize(
    ("trained", "other", "verdict"),
    [(80, 60, "shown"), (80, 79, "open"), (80, 80, "open"), (80, 81, "refuted"), (0, 0, "open"), (100, 0, "shown")],
)
def test_alkahest_is_needed_where_it_leads_every_other_carrier(trained: int, other: int, verdict: str) -> None:
    curves = {"alkahest": {1.0: halves(50, trained)}, "base": {1.0: halves(50, other)}, "turbo": {1.0: halves(0, 0)}}
    # A third carrier that draws nothing is led by whatever alkahest draws.
    assert decide(curves).verdict == verdict


def test_the_multiplier_is_chosen_on_one_half_and_counted_on_the_other() -> None:
    curves = {
        "alkahest": {1.0: halves(40, 90), 2.0: halves(70, 30), 3.0: halves(70, 99)},
        "base": {1.0: halves(10, 20)},
    }
    found = decide(curves)
    assert found.best["alkahest"] == 2.0  # the least of two that are as good
    assert found.counted["alkahest"].mean == 0.3
    assert found.leads["base"].mean == pytest.approx(0.1)


# ---- what is drawn


def test_every_claim_of_the_plan_has_its_drawings() -> None:
    """By PLAN.md's numbers: ten carriers, two deltas, six multipliers; six naive merges; three wrong parents beside the two right ones."""
    assert len(CARRIERS) == 10
    assert {name: len(set(PLAIN[name])) for name in PLAIN} == {
        "members": 18,
        "naive": 6,
        "deltas": 120,
        "two-stages": 36,
        "loras": 48,
        "wrong": 30,
    }
    names = [drawing.name for rows in PLAIN.values() for drawing in rows]
    assert len(set(names)) == len({row for rows in PLAIN.values() for row in rows})


def test_prompts_are_a_quarter_of_one_figure_and_a_quarter_held_out() -> None:
    found = scenes("all", 200)
    assert sum(scene.relation is None for scene in found) == sum(scene.held_out for scene in found) == 50
    assert all(scene.held_out for scene in scenes("held out", 20))
    assert all(scene.relation == "left of" for scene in scenes("two", 20, SIZES[1]))


# ---- readings


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained members."""
    folder = tmp_path_factory.mktemp("members")
    torch.manual_seed(1)
    tokenizer = models.tokenizer(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    models.store(models.vae(), folder / "vae")
    models.store(models.text_encoder(len(tokenizer)), folder / "text_encoder")
    for name in SHIPPED:
        models.store(models.transformer(), folder / name / "transformer")
    return folder


WAY = Way(2, 0.0, 3.0)


def bench(family: Path, folder: Path) -> Bench:
    return Bench(family, folder / "claims.json", folder / "state", count=2)


def test_what_was_read_is_not_drawn_again(family: Path, tmp_path: Path) -> None:
    drawing = Drawing(Mix("base"), WAY)
    bench(family, tmp_path).measure(drawing)
    shutil.rmtree(tmp_path / "state")
    again = bench(family, tmp_path).readings(drawing)
    assert again is not None
    assert again["adherent"].shape == (2,)
    assert bench(family, tmp_path).readings(dataclasses.replace(drawing, way=Way(3, 0.0, 3.0))) is None


def test_a_member_that_changed_is_drawn_again_with_all_that_is_made_of_it(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = tmp_path / "members"
    shutil.copytree(family, members)
    base = Drawing(Mix("base"), WAY)
    refined = dataclasses.replace(base, second=(0.3, "comfyui"))
    rows = [base, refined, Drawing(carried("mean_turbo", {"hollow - deturbo": 2.0}), WAY)]
    made = bench(members, tmp_path)
    for row in rows:
        made.measure(row)
    monkeypatch.setattr(benches, "_digest", benches._digest.__wrapped__)
    shutil.copytree(family / "alkahest", members / "turbo", dirs_exist_ok=True)
    known = [bench(members, tmp_path).readings(row) for row in rows]
    assert [readings is None for readings in known] == [False, True, True]


def test_a_delta_on_a_merge_keeps_the_refiners_of_the_merge(family: Path, tmp_path: Path) -> None:
    """Against torch: means and differences in float32 of what is stored, each merge rounded once."""
    made = bench(family, tmp_path)
    state = {
        name: load_file(family / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("base", "turbo", "striped")
    }
    for carrier, refiners in (("mean_turbo", None), ("mean_turbo_turbo", "turbo")):
        merged = load_file(made.model(carried(carrier, {"striped - base": 2.0})))
        for name, tensor in merged.items():
            base, turbo, striped = (state[member][name].float() for member in ("base", "turbo", "striped"))
            if "refiner" in name:
                wanted = state[refiners][name].float() if refiners else (base + turbo) / 2
            else:
                wanted = ((base + turbo) / 2).bfloat16().float() + 2 * (striped - base)
            assert torch.equal(tensor, wanted.bfloat16()), (carrier, name)


def test_a_second_stage_goes_on_from_the_first(family: Path, tmp_path: Path) -> None:
    """At a strength whose level is low its pictures are nearly the first's, also where those had been drawn without latents."""
    made = bench(family, tmp_path)
    first = Drawing(carried("alkahest", {"striped - base": 1.0}), WAY)
    made.measure(first)
    weak, strong = (dataclasses.replace(first, measured=True, second=(strength, "comfyui")) for strength in (0.01, 0.9))
    made.measure(weak)
    made.measure(strong)
    near, far = (made.readings(row) for row in (weak, strong))
    assert near is not None
    assert far is not None
    assert near["structural distance"].mean() < far["structural distance"].mean() / 2
    assert set(near) > {"structural distance", "colour distance", "structure", "roughness"}


def test_a_lora_is_compared_with_its_whole_difference(family: Path, tmp_path: Path) -> None:
    """At strength 0.1 most of it: the LoRA keeps 99.5 % of the matrices' energy."""
    made = bench(family, tmp_path)
    by_lora, whole = drawings.lora("turbo - alkahest", 0.1, WAY)
    made.measure(by_lora)
    found = made.readings(by_lora)
    assert found is not None
    plain = made.pictures(Drawing(Mix("alkahest"), WAY))
    moved = np.mean([images.structural_distance(*pair) for pair in zip(plain, made.pictures(whole), strict=True)])
    assert found["structural distance"].mean() < moved / 2


def test_readings_tell_figures_from_their_places() -> None:
    scene = Scene.parse("a red circle left of a blue square on a gold background")
    exchanged = Scene.parse("a blue square left of a red circle on a gold background")
    recoloured = Scene.parse("a blue circle left of a red square on a gold background")
    assert scene
    assert exchanged
    assert recoloured
    generator = np.random.default_rng(1)
    made = np.stack(
        [render(one, place(one, SIZES[0], generator), SIZES[0]) for one in (scene, exchanged, recoloured)]
        + [render(scene, place(scene, SIZES[0], generator), SIZES[0], striped=True)]
    )
    assert benches._read(made, [scene] * 4) == {
        "adherent": "1001",
        "figures": "1101",
        "relation": "1001",
        "striped": "0001",
        "hollow": "0000",
    }


# ---- verify


def looked(pictures: np.ndarray, adherent: np.ndarray, drifted: np.ndarray | None = None) -> Looked:
    measured = [images.measure(picture) for picture in pictures]
    values = {name: np.array([getattr(one, name) for one in measured]) for name in benches.MEASURES}
    return Looked({"adherent": adherent, **values}, drifted)


def test_verify_refuses_noise_and_a_drift_and_lost_prompts_and_nothing_else() -> None:
    generator = np.random.default_rng(2)
    wanted = scenes("all", 80)
    drawn = np.stack([render(scene, place(scene, SIZES[0], generator), SIZES[0]) for scene in wanted])
    right, still = np.ones(80, np.bool_), np.zeros(80, np.bool_)
    parent = looked(drawn, right, still)
    assert refusals(looked(drawn, right, still), [parent])["any"] == 0.0
    noise = generator.integers(0, 256, drawn.shape, np.uint8)
    assert refusals(looked(noise, ~right), [parent])["noise"] == 1.0
    assert refusals(looked(drawn, np.arange(80) < 30, still), [parent])["adherence"] == 1.0
    assert refusals(looked(drawn, right, ~still), [parent])["drift"] == 1.0
    assert refusals(looked(drawn, right, ~still), [looked(drawn, right, ~still)])["any"] == 0.0


# ---- the whole

CARRIED = {"alkahest": 1.0, "turbo": 0.5}


def invented(bench: Bench, drawing: Drawing) -> None:
    """Readings in which alkahest carries every delta, turbo half as often, and every other carrier loses them; base draws the rest."""
    share = CARRIED.get(drawing.mix.names[0], 0.0) if "-" in drawing.mix.expression else 0.95
    pictures = np.arange(bench.count)
    right = (pictures % 2 * 10 + pictures // 2 < 20 * share).tolist()  # half of them are every other one
    values = {
        name: "".join("01"[bit] for bit in right) for name in ("adherent", "figures", "relation", *drawings.DELTAS)
    }
    number = [0.1] * bench.count
    values |= {"structural distance": number, "colour distance": number} if drawing.beside else {}
    values |= {name: [0.7] * bench.count for name in benches.MEASURES} if drawing.measured else {}
    entry = {"inputs": bench._inputs(drawing), "reader": benches.READER, "readings": values}
    bench.stored[drawing.name] = entry | dict.fromkeys(("commit", "machine", "versions", "device"), "here")
    bench._save()


def test_one_command_measures_everything_once_and_writes_every_table(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Bench, "measure", invented)
    monkeypatch.setattr("training.claims.verdicts.RUNS", 3)
    monkeypatch.setattr(command.Clock, "listen", lambda clock: None)
    monkeypatch.setattr(command.batched, "compile_blocks", lambda: None)
    arguments = ["--members", str(family), "--state", str(tmp_path), "--quick"]
    command.main([*arguments, "--minutes", "0"])
    assert not (tmp_path / "quick.md").exists()
    command.main(arguments)
    text = (tmp_path / "quick.md").read_text()
    assert re.findall("<!-- table: (.*) -->", text) == ["claims", *command.TABLES]
    assert (
        "needed for the delta `striped - base` is **shown**: alkahest draws 100.0 % [100, 100] at 0.5, turbo 50.0 %"
        in text
    )
    assert "needed for both deltas at once is **shown**" in text
    assert "| `0.5*base + 0.5*turbo`, refiners of turbo | 95.0 %" in text
    capsys.readouterr()
    command.main(arguments)
    assert "0 minutes of one core are left" in capsys.readouterr().out
    assert (tmp_path / "quick.md").read_text() == text


# ---- pages


def test_a_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    page = tmp_path / "lab.md"
    page.write_text("before\n<!-- table: naive -->\nold\n<!-- end -->\nafter\n")
    tables.fill(page, "naive", "| new |")
    assert page.read_text() == "before\n<!-- table: naive -->\n| new |\n<!-- end -->\nafter\n"
    with pytest.raises(SystemExit, match="no place for"):
        tables.fill(page, "both", "")
