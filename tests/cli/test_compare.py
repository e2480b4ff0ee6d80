"""``mergetool compare`` and the guard of ``mergetool merge``, run as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mergetool import compare
from mergetool.cli.main import app
from mergetool.comparison import comparison
from mergetool.errors import CheckFailed, UsageError
from tests.cli.run import mergetool

PAIR = ("compare", "lab.base", "lab.striped")


def test_groups_blocks_and_advice_are_printed() -> None:
    ran = CliRunner().invoke(app, [*PAIR, "--reference", "lab.turbo"])
    assert ran.exit_code == 0, ran.stderr
    lines = ran.stdout.splitlines()
    (layers,) = (line.split() for line in lines if line.split()[:1] == ["layers"])
    assert layers[1:3] == ["889.73", "k"]
    assert "5.87 %" in " ".join(layers)
    assert layers[-3:] == ["0.011", "4.007", "0.1703"]
    assert any(line.split()[:2] == ["layers.5", "▒▒▒"] for line in lines)
    assert "multiplier 3.813 gives the delta the size of lab.turbo - lab.base" in ran.stdout
    assert 'mergetool merge "lab.base + 3.813*(lab.striped - lab.base)" --protect refiner' in ran.stdout


def test_a_terminal_without_shades_gets_ascii(tmp_path: Path) -> None:
    ran = mergetool(*PAIR, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert ran.code == 0, ran.err
    assert any(line.split()[:2] == ["layers.5", "+++"] for line in ran.out.splitlines())
    assert "\\u" not in ran.out.split("distance: ")[1]


def test_the_loss_in_json_is_that_of_the_merge_in_json(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, [*PAIR, "--onto", "lab.alkahest", "-m", "0.01", "--json"])
    compared = json.loads(ran.stdout)["rounding"]
    again = ["merge", compared["expression"], "--protect", "refiner", "-o", str(tmp_path / "out.safetensors"), "--json"]
    merged = json.loads(CliRunner().invoke(app, again).stdout)["rounding"]
    assert compared["total"] == merged["total"]
    assert compared["groups"] == merged["groups"]
    assert compared["total"]["eaten"] > 0


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("distance>5%", 1),
        ("distance > 0.07", 0),
        ("refiner:distance>0", 1),
        ("cosine<0.5", 1),
        ("reference>100", 0),
        ("target<0.2", 1),
        ("lost>1%", 0),
        ("norm:untraced>0", 0),
    ],
)
def test_a_condition_that_holds_is_exit_code_1(condition: str, code: int) -> None:
    ran = CliRunner().invoke(app, [*PAIR, "--reference", "lab.turbo", "--fail-on", condition, "--json"])
    assert ran.exit_code == code, ran.stderr
    assert len(json.loads(ran.stdout)["failed"]) == code
    assert ("mergetool: lab.base and lab.striped" in ran.stderr) == bool(code)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--fail-on", "distance=1"),
        ("--fail-on", "length>1"),
        ("--fail-on", "distance>1e"),
        ("--fail-on", "refinery:distance>1"),
        ("-m", "much"),
        ("-m", "0"),
        ("--target", "-1%"),
        ("--exclude", "layerz"),
        ("--plot", "x.jpg"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(arguments: tuple[str, str]) -> None:
    ran = CliRunner().invoke(app, [*PAIR, *arguments])
    assert ran.exit_code == 2
    assert ran.stderr.startswith("mergetool: ")
    assert ran.stderr.count("\n") == 1


def test_plot_and_page_are_written_and_never_over_others(tmp_path: Path) -> None:
    wanted = ("--plot", str(tmp_path / "map.png"), "--report", str(tmp_path / "page.html"))
    assert CliRunner().invoke(app, [*PAIR, *wanted]).exit_code == 0
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.size[0] > 400
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert CliRunner().invoke(app, [*PAIR, *wanted]).exit_code == 73
    assert CliRunner().invoke(app, [*PAIR, *wanted, "--overwrite"]).exit_code == 0


def test_a_merge_of_strangers_is_stopped_before_it_begins_unless_forced(tmp_path: Path) -> None:
    naive = ("merge", "0.5*lab.turbo + 0.5*lab.base", "-o", "out.safetensors")
    ran = mergetool(*naive, cwd=tmp_path)
    assert ran.code == 65
    assert "refiners would be averaged" in ran.err
    assert "--force merges anyway" in ran.err
    assert not list(tmp_path.glob("*.safetensors"))
    dry = CliRunner().invoke(app, [*naive, "--dry-run", "--json"])
    assert dry.exit_code == 0
    assert [finding["level"] for finding in json.loads(dry.stdout)["lineage"]] == ["warn", "error"]
    assert CliRunner().invoke(app, [*naive[:-1], str(tmp_path / "out.safetensors"), "--force"]).exit_code == 0
    assert (tmp_path / "out.safetensors").exists()


def test_a_wrong_base_is_warned_of_and_merged(tmp_path: Path) -> None:
    expression = "lab.alkahest + 2*(lab.hollow - lab.striped)"
    ran = CliRunner().invoke(
        app, ["merge", expression, "--protect", "refiner", "-o", str(tmp_path / "out.safetensors")]
    )
    assert ran.exit_code == 0
    assert any(line.startswith("warn") and "lab.striped does not look like" in line for line in ran.stdout.splitlines())
    right = CliRunner().invoke(app, ["merge", "lab.alkahest + 2*(lab.hollow - lab.deturbo)", "--dry-run", "--json"])
    (moves,) = json.loads(right.stdout)["lineage"]
    assert moves["text"].startswith("moves lab.alkahest by 29.7 %; lab.hollow is 14.5 % from lab.deturbo")


def test_the_api_draws_and_tells_which_conditions_hold(tmp_path: Path) -> None:
    plot, report = tmp_path / "map.png", tmp_path / "page.html"
    found = compare(
        "lab.base", "lab.striped", plot=plot, report=report, fail_on=["distance>5%", "refiner:distance>90%"]
    )
    assert (plot.exists(), report.exists()) == (True, True)
    assert [text.split(" is ")[0] for text in found.failed] == ["distance of all"]
    with pytest.raises(CheckFailed, match=r"lab\.base and lab\.striped: distance of all"):
        found.require_passed()


def test_a_condition_that_cannot_be_read_is_refused_before_a_model_is_opened() -> None:
    with pytest.raises(UsageError, match='`fail_on` "distance=1" is not METRIC>NUMBER'):
        compare("nowhere", "nowhere else", fail_on=["distance=1"])


def test_a_condition_on_a_group_that_is_not_there_is_refused_before_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: pytest.fail("the models were read"))
    with pytest.raises(UsageError, match='names "refinery", which is no group of these models; choose one of'):
        compare("lab.base", "lab.striped", fail_on=["refinery:distance>1"])


def test_an_option_is_spelled_as_the_command_has_it_that_speaks() -> None:
    CliRunner().invoke(app, ["sample", "--help"])
    assert "[default: A]" in CliRunner().invoke(app, ["compare", "--help"]).stdout
    ran = CliRunner().invoke(app, ["sample", "a circle"])
    assert "name one with --base" in ran.stderr
