"""What a recipe asks for: its outputs with variables put in, their names, what they use, and their options."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from mergetool.errors import RecipeError, UsageError
from mergetool.options.merging import MergeOptions
from mergetool.recipe import file, schema
from mergetool.recipe.file import RecipeFile, RecipeOutput, options_of

ROOT = Path(__file__).parents[2]


def read(text: str, *settings: str) -> RecipeFile:
    return file.read(text.encode(), Path("r.yaml"), settings)


def graphs(recipe: RecipeFile) -> list[str]:
    return [str(output.expression.graph) for output in recipe.outputs if output.expression]


def options(output: RecipeOutput) -> object:
    return options_of(MergeOptions, output, {name: name for name in output.uses})


MODELS = "models: {a: a.safetensors, b: b.safetensors}\n"


def test_a_variable_is_the_number_that_was_typed() -> None:
    recipe = read(MODELS + "variables: {m: 0.1}\nmerge: a + m*(a - b)\n")
    assert graphs(recipe) == ["a + 0.1*(a - b)"]
    (output,) = recipe.outputs
    assert output.expression is not None
    assert output.expression.graph.coefficients() == {"a": Fraction(11, 10), "b": Fraction(-1, 10)}


def test_a_negative_variable_is_a_factor_of_its_own() -> None:
    assert graphs(read(MODELS + "variables: {m: -2}\nmerge: a - m*(a - b)\n")) == ["a + 2*(a - b)"]


def test_the_command_line_sets_a_variable() -> None:
    text = MODELS + "variables: {m: 1}\nmerge: a + m*(a - b)\noutput: 'x-{m}.safetensors'\n"
    (output,) = read(text, "m=171.1").outputs
    assert (str(output.expression.graph), output.file) == ("a + 171.1*(a - b)", "x-171.1.safetensors")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("setting", "words"),
    [("mm=1", 'did you mean "m"'), ("m", "NAME=VALUE"), ("m=", "NAME=VALUE"), ("m=true", "neither"), ("m=[1]", None)],
)
def test_a_setting_of_no_variable_is_a_usage_error(setting: str, words: str | None) -> None:
    text = MODELS + "variables: {m: 1}\nmerge: a + m*(a - b)\n"
    with pytest.raises(UsageError, match=words):
        read(text, setting)


def test_a_sweep_is_the_product_of_its_values() -> None:
    recipe = read(MODELS + "sweep: {m: [5, 10], n: [0.5, 2, 3]}\nmerge: a + m*(a - b) + n*(b - a)\n")
    wanted = [f"r-{m}-{n}.safetensors" for m in ("5", "10") for n in ("0.5", "2", "3")]
    assert [output.file for output in recipe.outputs] == wanted
    assert recipe.outputs[0].label == "r (m=5, n=0.5)"


def test_a_setting_leaves_one_value_of_a_sweep() -> None:
    recipe = read(MODELS + "sweep: {m: [5, 10, 20]}\nmerge: a + m*(a - b)\n", "m=7")
    assert graphs(recipe) == ["a + 7*(a - b)"]


SWEPT = (
    MODELS
    + "sweep: {m: [5, 10]}\noutputs:\n  one: {merge: a + m*(a - b)}\n  alone: {merge: 0.5*a + 0.5*b}\n  two: {merge: 0.5*one + 0.5*a}\n"
    "  thin: {diff: {base: two, variant: b}}\n"
)


def test_an_output_is_made_once_for_each_value_that_it_depends_on() -> None:
    labels = [output.label for output in read(SWEPT).outputs]
    wanted = ["one (m=5)", "one (m=10)", "alone", "two (m=5)", "two (m=10)", "thin (m=5)", "thin (m=10)"]
    assert labels == wanted


def test_an_output_uses_the_earlier_one_of_its_own_values() -> None:
    by_label = {output.label: output for output in read(SWEPT).outputs}
    assert by_label["two (m=10)"].earlier == (by_label["one (m=10)"],)
    assert by_label["thin (m=5)"].earlier == (by_label["two (m=5)"],)


def test_a_text_stands_for_the_model_of_that_name() -> None:
    recipe = read(
        "models: {a: a.safetensors, z-image: z.safetensors}\nsweep: {t: [a, z-image]}\nmerge: lab.base + 2*(t - lab.base)\n"
        "output: 'from-{t}.safetensors'"
    )
    assert graphs(recipe) == ["lab.base + 2*(a - lab.base)", "lab.base + 2*('z-image' - lab.base)"]
    assert [output.file for output in recipe.outputs] == ["from-a.safetensors", "from-z-image.safetensors"]


def test_a_pattern_that_is_a_variables_name_is_no_use_of_it() -> None:
    recipe = read(MODELS + "sweep: {q: [1, 2]}\nmerge: a\nprotect: q\n")
    assert [output.label for output in recipe.outputs] == ["r"]


def test_options_are_those_of_the_command_line() -> None:
    (output,) = read(
        MODELS
        + "variables: {k: 0.5, s: 3}\nmerge: a + 2*(a - b)\nprotect: refiner\nexclude: [pad, 'layers.{s}']\nfrom: b\n"
        "set: {layers.0-1: '{k}', v: 0, layers: 'linear(0.2, 1.0)'}\ndtype: fp8_e4m3\nrounding: stochastic\nseed: '{s}'\nlayout: diffusers\n"
    ).outputs
    found = options_of(MergeOptions, output, {name: name for name in output.uses})
    assert (found.protect, found.exclude, found.keep_from) == (("refiner",), ("pad", "layers.3"), "b")
    assert found.multipliers[:2] == (("layers.0-1", Fraction(1, 2)), ("v", Fraction(0)))
    assert str(found.multipliers[2][1]) == "linear(0.2,1)"
    assert (found.dtype, found.rounding, found.seed, found.layout) == ("fp8_e4m3", "stochastic", 3, "diffusers")


def test_words_are_taken_in_capitals_and_with_either_dash() -> None:
    (output,) = file.read(b"models: {a: lab.base}\nmerge: a\nquant: FP8_scaled\n", Path("r.yaml")).outputs
    assert options_of(MergeOptions, output, {"a": "lab.base"}).quant == "fp8-scaled"


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "recipes.md").read_text()
    for kind in (schema.OneMerge, schema.LoraOutput, schema.DiffSpec, schema.PicturesSpec, schema.SeveralOutputs):
        for key in (field.alias or name for name, field in kind.model_fields.items()):
            assert f"`{key}`" in page or f"`{key}:" in page, key


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks" / "recipes").glob("*.yaml")))
def test_the_community_recipes_are_recipes(name: str) -> None:
    path = ROOT / "benchmarks" / "recipes" / f"{name}.yaml"
    assert file.load(path).outputs


def test_the_error_in_the_page_is_the_error() -> None:
    text = "models:\n  artshoot: x\n" + "#\n" * 7 + "merge: lab.base +2*(artshot - lab.base)\n"
    with pytest.raises(RecipeError) as caught:
        file.read(text.encode(), Path("bridge.yaml"))
    page = (ROOT / "docs" / "reference" / "recipes.md").read_text()
    assert str(caught.value) in page
