"""Methods that installed packages give: listed, marked, run, and imported only when named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.cli.run import Ran, mergetool
from tests.families import checkpoint
from tests.methods.plugin import HALVES, install


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path / "site"


def run(tmp_path: Path, *arguments: str) -> Ran:
    return mergetool(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))


def test_a_plug_ins_method_runs_in_a_merge(site: Path, tmp_path: Path) -> None:
    install(site, "half-price", "halved", HALVES.format(name="halved"))
    for variant, name in enumerate(["base", "tuned"]):
        checkpoint(tmp_path / f"{name}.safetensors", variant=variant)
    text = "halved('tuned.safetensors', base='base.safetensors', share=0.25)"
    ran = run(tmp_path, "merge", text, "-o", "out.safetensors", "--dtype", "fp32", "--force")
    assert ran.code == 0, ran.err
    name = "layers.0.feed_forward.w1.weight"
    base, tuned, out = (load_torch(tmp_path / f"{file}.safetensors", name) for file in ("base", "tuned", "out"))
    np.testing.assert_array_equal(out, base + (tuned - base) * np.float32(0.25))


def load_torch(path: Path, name: str) -> np.ndarray:
    from safetensors.torch import load_file

    return load_file(path)[name].float().numpy()


def test_a_plug_in_is_listed_with_its_package(site: Path, tmp_path: Path) -> None:
    install(site, "half-price", "halved", HALVES.format(name="halved"))
    assert "halved(delta, share=0.5)   [half-price]" in run(tmp_path, "methods").out
    found = {each["name"]: each for each in run(tmp_path, "methods", "--json").json["methods"]}
    assert (found["halved"]["package"], found["slerp"]["package"]) == ("half-price", "mergetool")
    assert "package half-price" in run(tmp_path, "methods", "halved").out


def test_one_that_cannot_be_imported_is_one_sentence(site: Path, tmp_path: Path) -> None:
    install(site, "broken", "halved", "import nowhere_to_be_found\n")
    sentence = (
        "the merge method \"halved\" of the package broken cannot be loaded: No module named 'nowhere_to_be_found' "
        "(ModuleNotFoundError); update or uninstall it."
    )
    named = run(tmp_path, "methods", "halved")
    assert (named.code, named.err) == (2, f"mergetool: {sentence}\n")
    listed = run(tmp_path, "methods", "--json")
    assert (listed.code, listed.json["errors"], listed.err) == (0, [sentence], f"mergetool: {sentence}\n")
    assert len(listed.json["methods"]) > 20
    merged = run(tmp_path, "merge", "halved(a, base=b)", "-o", "out.safetensors")
    assert (merged.code, merged.err) == (2, f"mergetool: column 1: {sentence}\n")


def test_one_that_registers_something_else_is_one_sentence(site: Path, tmp_path: Path) -> None:
    install(site, "other", "halved", HALVES.format(name="thirds"), function="thirds")
    ran = run(tmp_path, "methods", "halved")
    assert ran.code == 2
    assert 'the package other does not register the merge method "halved" in other:thirds' in ran.err


def test_a_name_that_two_packages_give_is_refused(site: Path, tmp_path: Path) -> None:
    install(site, "one", "halved", HALVES.format(name="halved"))
    install(site, "two", "halved", HALVES.format(name="halved"))
    ran = run(tmp_path, "methods", "halved")
    assert (ran.code, ran.err) == (
        2,
        'mergetool: the merge method "halved" is given by one and by two; uninstall all but one.\n',
    )


def test_a_name_that_is_ours_stays_ours_and_the_list_says_so(site: Path, tmp_path: Path) -> None:
    install(site, "rival", "slerp", HALVES.format(name="slerp"))
    assert "Shoemake" in run(tmp_path, "methods", "slerp").out
    assert "given by rival and by mergetool" in run(tmp_path, "methods").err


def test_a_plug_in_is_imported_only_when_it_is_named(site: Path, tmp_path: Path) -> None:
    leaves_a_mark = f"open({str(tmp_path / 'imported')!r}, 'w').close()\n" + HALVES.format(name="halved")
    install(site, "half-price", "halved", leaves_a_mark)
    run(tmp_path, "methods", "slerp")
    run(tmp_path, "merge", "slerp(a, b)", "-o", "out.safetensors")
    run(tmp_path, "merge", "halvd(a, base=b)", "-o", "out.safetensors")
    run(tmp_path, "--help")
    assert not (tmp_path / "imported").exists()
    run(tmp_path, "methods", "halved")
    assert (tmp_path / "imported").exists()


def test_the_documented_example_works_as_it_stands(site: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "methods.md").read_text()
    code = re.search(r"```python\n# loud_parts.py\n(.*?)```", page, re.DOTALL)
    assert code
    install(site, "loud-parts", "loud", code[1])
    checkpoint(tmp_path / "base.safetensors")
    checkpoint(tmp_path / "tuned.safetensors", variant=1)
    text = "loud('tuned.safetensors', base='base.safetensors', share=2)"
    ran = run(tmp_path, "merge", text, "-o", "out.safetensors", "--dtype", "fp32", "--force")
    assert ran.code == 0, ran.err
    name = "layers.0.feed_forward.w1.weight"
    base, tuned, out = (load_torch(tmp_path / f"{file}.safetensors", name) for file in ("base", "tuned", "out"))
    delta = tuned - base
    loud = np.abs(delta) >= 2 * np.sqrt((delta.astype(np.float64) ** 2).mean())
    assert 0 < loud.mean() < 0.2
    np.testing.assert_array_equal(out, base + delta * loud)
