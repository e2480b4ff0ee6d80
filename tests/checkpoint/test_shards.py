"""Shard indices: hostile names, agreement with the shards, which file of a folder is meant, and splitting."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest

from mergetool.checkpoint import shards
from mergetool.checkpoint.dtypes import BF16, F32
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.names import why_not_plain
from mergetool.checkpoint.shards import ShardIndex, choose, index_json, index_name, split
from mergetool.errors import InputMissing, ShardIndexError, UsageError

END = ".safetensors"
DEVICES = [
    "CON",
    "PRN",
    "AUX",
    "NUL",
    "CONIN$",
    "CONOUT$",
    "CLOCK$",
    *(f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³"),
]
HOSTILE = [
    *("", ".", "..", END, "a", "a.bin", "a.pt", "a.safetensors.bin", "a.SAFETENSORS", "a.safetensor", "safetensors", "a safetensors"),
    *("/a", "/etc/passwd", "//host/share/a", "a/b", "./a", "../a", "../../a", "a/../../b", "a/", "~/../a", "%2e%2e/a", "/"),
    *("\\a", "\\\\host\\share\\a", "a\\b", "..\\a", "..\\..\\a", "a\\..\\..\\b", "\\\\?\\C:\\a", "\\\\.\\PhysicalDrive0", "\\??\\a"),
    *("C:a", "C:\\a", "C:/a", "c:", "D:..\\a", "a:stream", "a:$DATA", "::$DATA", "file:///a", "http://x/a", "\\Device\\a"),
    *(f"{device}" for device in DEVICES),
    *(f"{device.lower()}.tar" for device in DEVICES),
    *("CON ", "con  ", "Nul .x", "AUX\t", "Com1 .", "lpt9 .a.b"),
    *(f"a{chr(code)}b" for code in range(0x20)),
    *(f"a{chr(code)}b" for code in (0x7F, 0x80, 0x85, 0x9B, 0x9F, 0xA0, 0xAD, 0x200B, 0x200E, 0x2028, 0x2029, 0x202E, 0x2066, 0xFEFF)),
    *("a*", "a?", 'a"', "a<b", "a>b", "a|b", "\ud800", "a\udcff", "\U000e0041", "\ue000", " a", "  "),
    *("a" * 300, "é" * 150),
]  # fmt: skip
COMPLETE = [".", "..", "a.safetensors ", "a.safetensors.", "a.safetensors..", "a.safetensors. ", "a.safetensors\0", "a.safetensors\n",
            "a.safetensors/", "a.safetensors/..", "a.safetensors\\", "a.safetensors::$DATA", "a.safetensors:x.safetensors",
            "../a.safetensors", "x\0/../../a.safetensors"]  # fmt: skip
WRONG_END, STEMS = HOSTILE[:12], HOSTILE[12:]
NAMES = sorted({*WRONG_END, *COMPLETE, *(stem + END for stem in STEMS)})


def index(weight_map: Any, **more: Any) -> bytes:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map, **more}).encode()


def parse(raw: bytes) -> ShardIndex:
    return ShardIndex.parse(raw, source="m.index.json")


def header(*names: str) -> Header:
    return Header.plan([(name, F32, (2,)) for name in names])


def test_there_are_enough_hostile_names() -> None:
    assert len(NAMES) >= 150


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_hostile_shard_name_is_refused(name: str) -> None:
    with pytest.raises(ShardIndexError) as caught:
        ShardIndex({"w": "good.safetensors", "v": name}, "m.index.json")
    assert str(caught.value).startswith('"m.index.json" names the shard "')
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "diffusion_pytorch_model-00001-of-00003.safetensors", "模型.safetensors", "a b.safetensors", "~.safetensors",
     "console.safetensors", "com10.safetensors", "a..b.safetensors", "model.fp16-00001-of-00002.safetensors", "a%2f.safetensors",
     "aux_head.safetensors", "-rf.safetensors", "é.safetensors", "$HOME.safetensors", "a" * 243 + ".safetensors"],
    ids=lambda name: name[:40],
)  # fmt: skip
def test_a_plain_shard_name_is_taken(name: str) -> None:
    assert ShardIndex({"w": name}, "m.index.json").shards == (name,)


def test_20000_random_names_that_pass_stay_in_the_folder() -> None:
    """The oracle is pathlib's reading of a name under both rules."""
    dice = random.Random(20)
    pieces = [
        *"abC:/\\. \0\n$~%|",
        "..",
        "../",
        "CON",
        "nul",
        "com1",
        "¹",
        "é",
        "\u202e",
        "\uff0e",
        ".safetensors",
        "C:",
        "//",
        "\\\\?\\",
    ]
    passed = 0
    for _ in range(20_000):
        name = "".join(dice.choices(pieces, k=dice.randint(0, 4))) + dice.choice(["", END, END, END])
        if why_not_plain(name, END) is None:
            passed += 1
            windows = PureWindowsPath(name)
            with warnings.catch_warnings():  # is_reserved is deprecated from Python 3.13 on
                warnings.simplefilter("ignore", DeprecationWarning)
                assert not windows.is_reserved()
            assert windows.parts == PurePosixPath(name).parts == (name,)
            assert not windows.drive
            assert name.endswith(END)
    assert passed > 1000


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"", "syntax error"),
        (b"[]", 'no "weight_map"'),
        (b"{}", 'no "weight_map"'),
        (index(None), 'no "weight_map"'),
        (index([]), 'no "weight_map"'),
        (index({}), 'no "weight_map"'),
        (index({"w": 1}), 'tensor "w" a file name that is not a string'),
        (index({"w": None}), "not a string"),
        (index({"w": ["a.safetensors"]}), "not a string"),
        (index({"w": {"file": "a.safetensors"}}), "not a string"),
        (b'{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}', '"w" twice'),
        (b'{"weight_map":{"w":"a.safetensors"},"weight_map":{"w":"b.safetensors"}}', '"weight_map" twice'),
        (b'{"weight_map":{"w":"\\ud800.safetensors"}}', "surrogate"),
        (b'{"weight_map":{"w":"\xff.safetensors"}}', "not UTF-8"),
        (b'{"weight_map":' * 50_000, "nested too deeply"),
        (b'{"metadata":{"total_size":' + b"9" * 5000 + b"}}", "5000 digits"),
        (b'{"metadata":NaN}', "NaN"),
        (index({"w": "a.safetensors"}).decode().encode("utf-16"), "not UTF-8"),
        (index({f"w{n}": f"{n}.safetensors" for n in range(1001)}), "names 1001 shards, but the limit is 1000"),
        (index({"v": "A.safetensors", "w": "a.safetensors"}), "some systems take for one file"),
        (index({"v": "\u00e9.safetensors", "w": "e\u0301.safetensors"}), "some systems take for one file"),
        (index({"v": "stra\u00dfe.safetensors", "w": "STRASSE.safetensors"}), "some systems take for one file"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_malformed_index_is_refused(raw: bytes, part: str) -> None:
    with pytest.raises(ShardIndexError) as caught:
        parse(raw)
    assert part in str(caught.value)
    assert str(caught.value).startswith('"m.index.json"')


def test_an_index_over_100_mb_is_refused_unread() -> None:
    shards.require_index_size(100_000_000, "m")
    with pytest.raises(ShardIndexError, match="100000001 bytes"):
        shards.require_index_size(100_000_001, "m")


def test_what_other_programs_add_to_an_index_is_ignored() -> None:
    assert parse(index({"w": "a.safetensors"}, note="x", metadata={"total_size": 1.0})).weight_map == {
        "w": "a.safetensors"
    }


def test_index_and_shards_that_agree_are_taken() -> None:
    known = parse(index({"v": "a.safetensors", "w": "b.safetensors", "x": "a.safetensors"}))
    assert known.shards == ("a.safetensors", "b.safetensors")
    known.require_agreement({"a.safetensors": header("v", "x"), "b.safetensors": header("w")})


@pytest.mark.parametrize(
    ("first", "second", "part"),
    [
        (["v"], [], 'tensor "w" is in "b.safetensors", but it is not'),
        (["v", "w"], [], 'tensor "w" is in "b.safetensors", but it is not'),
        (["v", "w"], ["w"], 'tensor "w" is in "a.safetensors", but the index says it is in "b.safetensors"'),
        (["v"], ["w", "extra"], 'tensor "extra" is in "b.safetensors", but the index does not list it'),
    ],
)
def test_index_and_shards_that_disagree_are_refused(first: list[str], second: list[str], part: str) -> None:
    with pytest.raises(ShardIndexError) as caught:
        parse(index({"v": "a.safetensors", "w": "b.safetensors"})).require_agreement(
            {"a.safetensors": header(*first), "b.safetensors": header(*second)}
        )
    assert part in str(caught.value)


def folder_with(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["a.safetensors"], "a.safetensors"),
        (["a.safetensors", "readme.md", ".hidden.safetensors", "._a.safetensors"], "a.safetensors"),
        (["x.index.json", "a.safetensors", "b.safetensors"], "x.index.json"),
        (["a-00001-of-00001.safetensors", "a.safetensors.index.json"], "a.safetensors.index.json"),
        (["pytorch_model.bin.index.json", "model.safetensors"], "model.safetensors"),
        (["a.safetensors.index.json", "model.safetensors.index.json"], "model.safetensors.index.json"),
        (["a.safetensors", "model.safetensors"], "model.safetensors"),
        (["model.safetensors", "diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors", "model.safetensors.index.fp16.json"],
         "model.safetensors.index.fp16.json"),
        (["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors", "model.fp16.safetensors.index.json"],
         "model.fp16.safetensors.index.json"),
        (["flux.sft"], "flux.sft"),
        (["M.SAFETENSORS"], "M.SAFETENSORS"),
        (["z.gguf"], "z.gguf"),
        (["z.gguf", "a.safetensors"], "a.safetensors"),
        (["model_index.json", "unet/diffusion_pytorch_model.safetensors", "vae/b.safetensors"],
         "unet/diffusion_pytorch_model.safetensors"),
        (["model_index.json", "transformer/a.safetensors", "vae/b.safetensors"], "transformer/a.safetensors"),
        (["model_index.json", "flux.safetensors", "transformer/a.safetensors"], "transformer/a.safetensors"),
        (["transformer/a.safetensors"], "transformer/a.safetensors"),
        (["z.safetensors", "transformer/a.safetensors"], "z.safetensors"),
    ],
    ids=str,
)  # fmt: skip
def test_the_file_a_folder_is_about(tmp_path: Path, names: list[str], chosen: str) -> None:
    assert choose(folder_with(tmp_path, *names)) == tmp_path / chosen


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors", "model.fp16.safetensors"],
        ["diffusion_pytorch_model.bf16.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
        ["model.safetensors.index.json", "model.safetensors.index.fp16.json"],
        ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "model.fp16.safetensors"],
        ["a.safetensors.index.json", "a.safetensors.index.fp16.json"],
    ],
    ids=str,
)
def test_several_variants_of_a_model_are_asked_about(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(UsageError, match="name") as caught:
        choose(folder_with(tmp_path, *names))
    assert all(f'"{name}"' in str(caught.value) for name in names if "-of-" not in name)


def test_a_pipeline_of_two_denoising_models_is_asked_about(tmp_path: Path) -> None:
    names = ["model_index.json", "transformer/a.safetensors", "transformer_2/a.safetensors", "vae/b.safetensors"]
    with pytest.raises(UsageError, match="2 models that denoise") as caught:
        choose(folder_with(tmp_path, *names))
    assert str(tmp_path / "transformer") in str(caught.value)
    assert str(tmp_path / "transformer_2") in str(caught.value)


def test_the_main_revision_of_a_repository_in_the_cache_is_opened(tmp_path: Path) -> None:
    place = folder_with(
        tmp_path / "models--a--b", "snapshots/12/model.safetensors", "snapshots/34/model.safetensors", "refs/main"
    )
    (place / "refs" / "main").write_text("34")
    with pytest.raises(UsageError, match="models--a--b"):
        choose(tmp_path)
    assert choose(place) == place / "snapshots" / "34" / "model.safetensors"
    (place / "refs" / "main").write_text("../../secret")
    with pytest.raises(UsageError, match="2 revisions"):
        choose(place)


def test_a_folder_of_model_folders_names_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name one of them") as caught:
        choose(folder_with(tmp_path, "one/model.safetensors", "two/a.safetensors", "three/readme.md"))
    assert (str(tmp_path / "one") in str(caught.value), "three" in str(caught.value)) == (True, False)


def test_several_models_in_a_folder_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'holds 2 models \("a\.safetensors", "b\.safetensors"\); name one of them'):
        choose(folder_with(tmp_path, "b.safetensors", "a.safetensors"))


def test_shards_without_their_index_say_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'index "m\.safetensors\.index\.json"; download it too'):
        choose(folder_with(tmp_path, "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"))
    with pytest.raises(UsageError, match=r'index "m\.safetensors\.index\.fp16\.json"; download it too'):
        choose(folder_with(tmp_path / "v", "m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"))


@pytest.mark.parametrize(
    ("names", "part"),
    [
        ([], "holds no .safetensors file"),
        (["config.json"], "holds no .safetensors file"),
        (["diffusion_pytorch_model.bin"], 'holds "diffusion_pytorch_model.bin" but no .safetensors'),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"], "pickles are never loaded"),
        (["model_index.json", "transformer/model.ckpt"], 'holds "model.ckpt"'),
    ],
    ids=str,
)
def test_a_folder_without_a_model_is_refused(tmp_path: Path, names: list[str], part: str) -> None:
    with pytest.raises(InputMissing) as caught:
        choose(folder_with(tmp_path, *names))
    assert part in str(caught.value)


def test_a_linked_transformer_folder_is_followed(tmp_path: Path) -> None:
    folder_with(tmp_path / "elsewhere", "a.safetensors")
    pipeline = folder_with(tmp_path / "pipeline", "model_index.json")
    (pipeline / "transformer").symlink_to(tmp_path / "elsewhere")
    assert choose(pipeline) == pipeline / "transformer" / "a.safetensors"


def test_a_folder_that_does_not_exist_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="cannot be listed"):
        choose(tmp_path / "none")


def test_splitting_fills_shards_in_file_order() -> None:
    whole = Header.plan(
        [("a", BF16, (50,)), ("b", BF16, (50,)), ("c", F32, (75,)), ("d", BF16, (1,)), ("e", BF16, (51,))], {"k": "v"}
    )
    parts = split(whole, 200)
    assert [list(part.header.tensors) for part in parts] == [["c"], ["a", "b"], ["d", "e"]]
    assert [part.name for part in parts] == [f"diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert all(dict(part.header.metadata) == {"k": "v"} for part in parts)
    assert sum(part.header.data_size for part in parts) == whole.data_size


@pytest.mark.parametrize("size", [1, 7, 8, 9, 40, 79, 80, 81, 10**12])
def test_split_shards_agree_with_their_index(size: int) -> None:
    whole = header(*"qwertyuiop")
    parts = split(whole, size, stem="model")
    encoded = index_json(parts)
    known = parse(encoded)
    known.require_agreement({part.name: part.header for part in parts})
    assert set(known.weight_map) == set(whole.tensors)
    assert all(part.header.data_size <= max(size, 8) for part in parts)
    assert json.loads(encoded)["metadata"] == {"total_size": 80}
    assert list(json.loads(encoded)["weight_map"]) == sorted("qwertyuiop")
    assert index_name("model") == "model.safetensors.index.json"


def test_the_index_bytes_are_fixed() -> None:
    parts = split(header("b", "a"), 8)
    assert index_json(parts).decode() == (
        '{\n  "metadata": {\n    "total_size": 16\n  },\n  "weight_map": {\n'
        '    "a": "diffusion_pytorch_model-00002-of-00002.safetensors",\n'
        '    "b": "diffusion_pytorch_model-00001-of-00002.safetensors"\n  }\n}\n'
    )


@pytest.mark.parametrize("size", [0, -1])
def test_a_shard_size_that_holds_nothing_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="holds nothing"):
        split(header("a"), size)


def test_a_shard_size_that_makes_too_many_files_is_refused() -> None:
    with pytest.raises(UsageError, match="makes 1001 files"):
        split(header(*map(str, range(1001))), 8)
