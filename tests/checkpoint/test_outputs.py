"""What an output's name says: a file or a folder, and which names are refused with one that works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergetool.checkpoint.outputs import ENDINGS, Target, is_file_name, lora_target, model_target, named
from mergetool.errors import OutputError, UsageError


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("zimage_v1.5", "zimage_v1.5.safetensors"),
        ("merged", "merged.safetensors"),
        ("mix.fp16", "mix.fp16.safetensors"),
        ("a.b/mix", "a.b/mix.safetensors"),
        ("mix.", "mix..safetensors"),
        ("mix.SAFETENSORS", "mix.SAFETENSORS"),
        ("flux.sft", "flux.sft"),
        ("'my mix.safetensors'", "my mix.safetensors"),
        ('"mix"', "mix.safetensors"),
        ("“mix.safetensors”", "mix.safetensors"),
        ("file:///tmp/a%20b.safetensors", "/tmp/a b.safetensors"),
    ],
)
def test_a_name_without_a_known_ending_gets_safetensors(name: str, written: str) -> None:
    target = model_target(name)
    assert (target.path, target.kind) == (Path(written), "file")
    assert bool(target.note) == (not is_file_name(name.strip("'\"“”")))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("out/", {}),
        ("out//", {}),
        ("v1.5/", {}),
        ("out/.", {}),
        ("out", {"layout": "diffusers"}),
        ("out", {"shard_size": 1000}),
        ("v1.5", {"shard_size": "5GB"}),
    ],
)
def test_a_folder_has_a_slash_the_diffusers_layout_or_shards(name: str, options: dict[str, object]) -> None:
    target = model_target(name, **options)  # type: ignore[arg-type]
    assert (target.kind, target.path.name, target.note) == ("folder", name.rstrip("/.").split("/")[0], "")
    assert str(target).startswith("folder ")


def test_a_file_keeps_its_ending_in_the_diffusers_layout() -> None:
    assert model_target("mix.safetensors", layout="diffusers") == Target(Path("mix.safetensors"), "file")


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("m.gguf", "m.safetensors"),
        ("m.CKPT", "m.safetensors"),
        ("m.pt", "m.safetensors"),
        ("m.pth", "m.safetensors"),
        ("m.bin", "m.safetensors"),
        ("m.pkl", "m.safetensors"),
        ("m.safetensor", "m.safetensors"),
        ("m.saftensors", "m.safetensors"),
        ("m.safetensors2", "m.safetensors"),
        ("m.safetensors.bak", "m.bak.safetensors"),
        ("m.gguf.part", "m.part.safetensors"),
        ("m.json", "m.safetensors"),
        ("deep/er/m.onnx", "deep/er/m.safetensors"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"layout": "diffusers"}, {"shard_size": 5}])
def test_another_ending_is_refused_with_a_name_that_works(name: str, better: str, options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=re.escape(f'name it "{better}"')):
        model_target(name, **options)  # type: ignore[arg-type]
    assert named(better) == Target(Path(better), "file")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", ".safetensors", "sub/.sft", "hf://org/repo", "s3://b/m.safetensors"]
)
def test_what_names_no_output_here_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        model_target(name)


def test_a_file_with_a_slash_or_shards_contradicts_itself() -> None:
    for name, options in (("m.safetensors/", {}), ("m.sft", {"shard_size": 5})):
        with pytest.raises(UsageError, match="leave"):
            model_target(name, **options)  # type: ignore[arg-type]


def test_a_folder_that_exists_is_not_given_an_ending(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(OutputError, match="is a folder; name a file in it"):
        model_target(tmp_path / "models")
    with pytest.raises(OutputError, match="is a folder"):
        model_target(tmp_path / "models", overwrite=True)


def test_a_models_folder_is_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert model_target(str(tmp_path / "model"), overwrite=True) == Target(tmp_path / "model", "folder")


def test_a_lora_is_a_file_and_a_peft_adapter_a_folder() -> None:
    assert lora_target("style") == Target(Path("style.safetensors"), "file", lora_target("style").note)
    assert lora_target("style", folder=True) == Target(Path("style"), "folder")
    with pytest.raises(UsageError, match=re.escape('name it "style.safetensors"')):
        lora_target("style/")
    with pytest.raises(UsageError, match='name it "style"'):
        lora_target("style.safetensors", folder=True)


def test_the_home_folder_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("USERPROFILE", "/home/someone")
    assert model_target("~/mix.safetensors").path == Path("/home/someone/mix.safetensors")


@given(
    st.text("ab.v15 _-é", min_size=1),
    st.sampled_from(["", "/", ".safetensors", ".SFT", ".gguf", ".bin", ".safetensor"]),
)
def test_what_is_written_has_an_ending_or_is_a_folder(stem: str, ending: str) -> None:
    try:
        target = named(stem + ending)
    except UsageError as refused:
        better = re.search('name it "(.*)"', str(refused))
        if better:
            assert named(better[1]).kind == "file"
    else:
        assert target.path.name.lower().endswith(ENDINGS) != (target.kind == "folder")
        assert (target.kind == "folder") == (ending == "/")
