"""The comparison itself: who is run how, that outputs are checked, and that ratios are of the right pairs."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import bench_merge, ceiling, contenders
from benchmarks.agreement import compare
from benchmarks.bench_merge import Series, main, results, table
from benchmarks.ceiling import Strategy
from benchmarks.contenders import ByteCopy, Mergekit, Mergetool, Models, SdMecha, run_synced
from benchmarks.generate import SIZES, Spec, family, generate
from benchmarks.measure import Usage
from benchmarks.values import Delta

COLD = Strategy(threads=2, chunk=1 << 20, direct_read=False, direct_write=False)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A tiny family."""
    folder = tmp_path_factory.mktemp("models")
    for path, spec in family(folder, Spec(config=SIZES["tiny"]), Delta(seed=0)).items():
        generate(path, spec)
    return Models.in_folder(folder)


def reference(models: Models, *, protected: str = "nothing") -> dict[str, torch.Tensor]:
    a, b, c = (load_file(path) for path in models.paths)
    merged = {name: (a[name].float() + 20 * (b[name].float() - c[name].float())).bfloat16() for name in a}
    return {name: a[name] if protected in name else merged[name] for name in a}


def series(contender: contenders.Contender, *seconds: float, warm: bool = False) -> Series:
    usages = [Usage(seconds=each, peak_anon=2_000_000, peak_rss=3_000_000, read_bytes=5) for each in seconds]
    return Series(contender, warm, "warm" if warm else "cold", usages, [each + 1 for each in seconds], written=7)


# ---- agreement with float32 arithmetic


def test_the_right_merge_agrees_in_every_element(models: Models, tmp_path: Path) -> None:
    save_file(reference(models), tmp_path / "out.safetensors")
    found = compare([tmp_path / "out.safetensors"], models.paths, 20)
    assert (found.elements, found.unequal, found.largest) == (592_896, 0, 0.0)


def test_an_output_in_shards_is_one_output(models: Models, tmp_path: Path) -> None:
    merged = list(reference(models).items())
    save_file(dict(merged[:9]), tmp_path / "1.safetensors")
    save_file(dict(merged[9:]), tmp_path / "2.safetensors")
    assert compare(sorted(tmp_path.iterdir()), models.paths, 20).unequal == 0


def test_one_wrong_element_is_counted(models: Models, tmp_path: Path) -> None:
    merged = reference(models)
    merged["x_pad_token"][0, 3] += 2.0
    save_file(merged, tmp_path / "out.safetensors")
    found = compare([tmp_path / "out.safetensors"], models.paths, 20)
    assert found.unequal == 1
    assert found.largest == pytest.approx(2.0, rel=2**-8)  # one bf16 rounding


def test_protected_tensors_must_be_the_first_models(models: Models, tmp_path: Path) -> None:
    save_file(reference(models, protected="refiner"), tmp_path / "out.safetensors")
    assert compare([tmp_path / "out.safetensors"], models.paths, 20, protected="refiner").unequal == 0
    assert compare([tmp_path / "out.safetensors"], models.paths, 20).unequal > 10_000


def test_a_missing_tensor_is_refused(models: Models, tmp_path: Path) -> None:
    merged = reference(models)
    del merged["x_pad_token"]
    save_file(merged, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="x_pad_token"):
        compare([tmp_path / "out.safetensors"], models.paths, 20)


def test_another_dtype_is_refused(models: Models, tmp_path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in reference(models).items()}, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="float16"):
        compare([tmp_path / "out.safetensors"], models.paths, 20)


# ---- contenders


def fake(folder: Path, name: str, code: str) -> Path:
    """An executable that runs `code` in Python."""
    program = folder / name
    program.write_text(f"#!{sys.executable} -S\n{code}\n")
    program.chmod(0o755)
    return program


def test_mergekit_gets_weights_1_20_and_minus_20_unnormalised(models: Models, tmp_path: Path) -> None:
    fake(
        tmp_path,
        "mergekit-pytorch",
        "import sys, shutil, os; os.mkdir(sys.argv[2]); shutil.copy(sys.argv[1], sys.argv[2])",
    )
    run_synced(Mergekit(tmp_path / "python"), models, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "merged" / "config.yaml").read_text())
    assert config["merge_method"] == "linear"
    assert config["parameters"] == {"normalize": False}
    assert [(m["model"], m["parameters"]["weight"]) for m in config["models"]] == [
        (str(models.alkahest), 1.0),
        (str(models.turbo), 20.0),
        (str(models.deturbo), -20.0),
    ]


def test_sd_mecha_gets_the_models_in_order_and_the_multiplier(models: Models, tmp_path: Path) -> None:
    python = fake(tmp_path, "python", "import sys, json; open(sys.argv[5], 'w').write(json.dumps(sys.argv))")
    run_synced(SdMecha(python), models, tmp_path / "out")
    _, script, *words = json.loads((tmp_path / "out" / "merged.safetensors").read_text())
    assert Path(script).read_text().startswith('"""a + alpha * (b - c) with sd-mecha')
    assert words == [*map(str, models.paths), str(tmp_path / "out" / "merged.safetensors"), "--alpha", "20"]


def test_a_contender_that_fails_is_an_error_with_its_words(models: Models, tmp_path: Path) -> None:
    python = fake(tmp_path, "python", "import sys; sys.exit('no such merge')")
    with pytest.raises(RuntimeError, match=r"exit code 1 from: .*sd_mecha_merge(.|\n)*no such merge"):
        run_synced(SdMecha(python), models, tmp_path / "out")


def test_mergetools_command_quotes_paths_and_protects_the_refiners(models: Models, tmp_path: Path) -> None:
    command = Mergetool(("--threads", "1")).command(models, tmp_path)
    assert command[1:] == [
        "merge",
        f'"{models.alkahest}" + 20 * ("{models.turbo}" - "{models.deturbo}")',
        *("--protect", "refiner", "--threads", "1", "-o", tmp_path / "merged.safetensors"),
    ]


def test_the_needed_bytes_are_all_but_the_refiners(models: Models) -> None:
    needed = sum(end - start for start, end in contenders.unprotected_ranges(models.turbo))
    tensors = load_file(models.turbo)
    assert needed == sum(tensor.nbytes for name, tensor in tensors.items() if "refiner" not in name)


# ---- rows and table


def test_ratios_are_of_the_same_round_and_the_same_cache_state() -> None:
    ran = [
        series(ByteCopy(COLD), 1.0, 10.0),
        series(Mergetool(), 2.0, 20.0),
        series(Mergekit(Path("p")), 8.0, 80.0),
        series(ByteCopy(COLD), 0.5, 0.5, warm=True),
        series(Mergetool(), 2.0, 2.0, warm=True),
    ]
    rows = {(r.provider, r.ratio_to, r.cache): r for r in results(ran, "full") if r.metric == "seconds"}
    assert rows["mergetool", "byte copy", "cold"].ratio == 2.0
    assert rows["mergetool", "byte copy", "warm"].ratio == 4.0
    assert rows["mergekit", "byte copy", "cold"].ratio == 8.0
    assert rows["mergetool", "mergekit", "cold"].ratio == 0.25
    row = rows["mergetool", "byte copy", "cold"]
    assert (row.case, row.bytes_read, row.bytes_written, row.peak_anon_mb, row.peak_rss_mb) == ("full", 5, 7, 2.0, 3.0)


def test_the_synced_time_has_rows_of_its_own() -> None:
    ran = [series(ByteCopy(COLD), 1.0), series(Mergetool(), 3.0)]
    synced = [row for row in results(ran, "full") if row.metric == "seconds_synced"]
    assert [(row.values, row.ratio) for row in synced] == [([2.0], 1.0), ([4.0], 2.0)]


def test_the_table_names_every_contender_and_the_ratio_to_each_peer(models: Models) -> None:
    ran = [series(ByteCopy(COLD), 1.0), series(Mergetool(), 2.0), series(SdMecha(Path("p")), 8.0)]
    text = table(ran, models)
    assert [line.split("  ")[0] for line in text.splitlines()[1:4]] == ["byte copy", "mergetool", "sd-mecha"]
    assert "mergetool / sd-mecha: 0.250 of its seconds, 0.333 until synced" in text


def test_a_whole_run_on_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "DROP_CACHES", tmp_path / "not" / "there")
    monkeypatch.setattr(ceiling, "STRATEGIES", (COLD,))
    folder = tmp_path / "models"
    words = ["--dir", str(folder), "--size", "tiny", "--runs", "1", "--no-peers", "--check"]
    main([*words, "--results", str(tmp_path / "results.csv")])
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == ["byte copy", "byte copy", "mergetool", "mergetool"]
    assert json.loads(rows[2]["config"])["agreement"].startswith("0 of 592896 elements differ")
    assert {path.name for path in folder.iterdir()} == {path.name for path in Models.in_folder(folder).paths}


def test_variants_are_the_options_and_a_warm_cache() -> None:
    labels = [one.label for one in bench_merge.variants(COLD, COLD)]
    assert labels == [
        "byte copy, unprotected bytes",
        *(f"mergetool, --threads {count}" for count in (1, 2, 4)),
        *(f"mergetool, --reader {reader}" for reader in ("mmap", "pread")),
        "byte copy, warm cache",
        "mergetool, warm cache",
    ]
