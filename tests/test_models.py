"""What a MODEL argument means: registered names, paths and hf:// addresses, without a network."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn

import numpy
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file

from mergetool import models
from mergetool.checkpoint import hub
from mergetool.checkpoint.hub import HubAddress
from mergetool.errors import DataError, InputMissing, OutputError, UsageError
from mergetool.making.places import Places
from mergetool.recipe.file import load
from tests import families

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, a config folder and a Hub cache of the test's own, and no network."""

    def no_network(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a socket was opened")

    for name in ("work", "hub"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("MERGETOOL_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "socket", no_network)
    return tmp_path


def tensors(value: float = 1.0) -> dict[str, numpy.ndarray[Any, Any]]:
    return {"blocks.0.weight": numpy.full((2, 2), value, dtype=numpy.float32)}


def model_file(path: Path, value: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors(value), path)
    return path


def user_file(root: Path) -> Path:
    return root / "config" / "models.toml"


# ---- paths


def test_a_path_is_itself(elsewhere: Path) -> None:
    path = model_file(elsewhere / "m.safetensors")
    assert models.resolve(str(path)) == models.ResolvedModel(str(path), path)
    model_file(Path("here.safetensors"))
    assert models.resolve("here.safetensors").path == Path("here.safetensors")


@pytest.mark.parametrize("model", ["none.safetensors", "a/b", "/none", "..x/y", "", "a\0b", "x" * 5000, "\x1b[2J"])
def test_a_path_to_nothing_is_missing(model: str) -> None:
    with pytest.raises(InputMissing) as caught:
        models.resolve(model)
    assert "check the path" in str(caught.value)
    assert str(caught.value).isprintable()


def test_other_addresses_are_refused() -> None:
    with pytest.raises(UsageError, match="write hf://org/repo"):
        models.resolve("s3://bucket/key")


@pytest.mark.parametrize(
    "page",
    [
        "https://civitai.com/models/1234/some-mix?modelVersionId=5",
        "civitai.com/api/download/models/5",
        "https://huggingface.co/datasets/org/set/blob/main/x.safetensors",
        "https://huggingface.co/org",
        "http://example.com/m.safetensors",
    ],
)
def test_a_web_page_is_refused_with_what_to_do(page: str) -> None:
    with pytest.raises(UsageError, match="download the model and name the file"):
        models.resolve(page)


@pytest.mark.parametrize("spelled", ['"{}"', "'{}'", "“{}”", "„{}“", " {} ", ' "{}"\n', "file://{}"])
def test_a_copied_path_is_understood(elsewhere: Path, spelled: str) -> None:
    path = model_file(elsewhere / "a b.safetensors")
    copied = spelled.format(path.as_uri().removeprefix("file://") if "file" in spelled else path)
    assert models.resolve(copied).path == path
    models.add("copied", copied)
    assert models.resolve("copied").path == path


def test_a_path_that_exists_as_it_stands_is_itself(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(elsewhere))
    for name in ("'quoted.safetensors'", "~", "~.safetensors"):
        model_file(Path(name))
        assert models.resolve(name).path == Path(name)


def test_a_file_named_after_an_embedded_model_is_itself() -> None:
    """As `diff` names the LoRA of two embedded models."""
    path = model_file(Path("lab.striped-minus-lab.base.safetensors"))
    assert models.resolve(str(path)).path == path


def test_an_embedded_model_goes_before_a_file_of_its_name() -> None:
    model_file(Path("lab.base"))
    assert models.resolve("lab.base").path == models.EMBEDDED / "base"


def test_the_home_folder_is_expanded_everywhere(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(elsewhere))
    path = model_file(elsewhere / "m.safetensors")
    assert models.resolve("~/m.safetensors").path == path
    (Path("r.yaml")).write_text("models: {m: ~/m.safetensors}\nmerge: m\n")
    recipe = load(Path("r.yaml"))
    assert models.resolve(Places(recipe, Path()).names(recipe.outputs[0])["m"]).path == path


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("alkahset.safetensors", 'did you mean "alkahest.safetensors"'),
        ("C:\\models\\x.safetensors", "path of Windows"),
        ("\\\\nas\\x.safetensors", "path of Windows"),
    ],
)
def test_a_path_to_nothing_gets_a_hint(typed: str, words: str) -> None:
    model_file(Path("alkahest.safetensors"))
    with pytest.raises(InputMissing, match=words):
        models.resolve(typed)


# ---- names


def test_a_registered_name_leads_to_its_path(elsewhere: Path) -> None:
    path = model_file(elsewhere / "m.safetensors")
    models.add("alkahest", str(path))
    assert models.resolve("alkahest") == models.ResolvedModel("alkahest", path)
    assert tomllib.loads(user_file(elsewhere).read_text()) == {"models": {"alkahest": str(path)}}


def test_the_user_s_names_keep_absolute_paths(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_file(Path("m.safetensors"))
    models.add("m", "m.safetensors")
    monkeypatch.chdir(elsewhere)
    assert models.resolve("m").path == elsewhere / "work" / "m.safetensors"


def test_names_of_the_working_folder_keep_relative_paths() -> None:
    model_file(Path("sub/m.safetensors"))
    models.add("m", "sub/m.safetensors", "here")
    assert tomllib.loads(Path("mergetool.toml").read_text()) == {"models": {"m": "sub/m.safetensors"}}
    assert models.resolve("m").path == Path("sub/m.safetensors")


def test_a_home_folder_is_understood(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(elsewhere))
    path = model_file(elsewhere / "m.safetensors")
    models.add("m", "~/m.safetensors")
    assert models.resolve("m").path == path
    Path("mergetool.toml").write_text('[models]\nn = "~/m.safetensors"\n')
    assert models.resolve("n").path == path


def test_here_goes_before_user_and_user_before_catalogue_and_path(elsewhere: Path) -> None:
    first, second = (model_file(elsewhere / f"{n}.safetensors") for n in (1, 2))
    assert {e.origin for e in models.listing()} == {"catalogue"}
    model_file(Path("z-image"))
    models.add("z-image", str(first))
    assert models.resolve("z-image").path == first
    models.add("z-image", str(second), "here")
    assert models.resolve("z-image").path == second
    assert models.resolve("./z-image").path == Path("z-image")
    assert [(e.path, e.origin) for e in models.listing() if e.name == "z-image"] == [(str(second), "here")]


def test_the_listing_is_sorted_and_has_the_catalogue() -> None:
    names = [entry.name for entry in models.listing()]
    assert names == sorted(names)
    assert {"z-image", "z-image-turbo", "z-image-turbo-comfyui", "z-image-deturbo"} <= set(names)


def test_every_address_of_the_catalogue_is_well_formed() -> None:
    for entry in models.listing():
        assert str(HubAddress.parse(entry.path)) == entry.path


def test_adding_again_replaces_and_removing_forgets(elsewhere: Path) -> None:
    first, second = (model_file(elsewhere / f"{n}.safetensors") for n in (1, 2))
    models.add("m", str(first))
    models.add("n", str(first))
    models.add("m", str(second))
    assert models.resolve("m").path == second
    models.remove("m")
    with pytest.raises(InputMissing):
        models.resolve("m")
    assert models.resolve("n").path == first


def test_removing_takes_the_working_folder_s_name_first(elsewhere: Path) -> None:
    first, second = (model_file(elsewhere / f"{n}.safetensors") for n in (1, 2))
    models.add("m", str(first))
    models.add("m", str(second), "here")
    models.remove("m")
    assert models.resolve("m").path == first


@pytest.mark.parametrize(
    ("name", "part"),
    [("alkahset", 'did you mean "alkahest"'), ("qqqqqq", "mergetool models list"), ("z-image", "built-in catalogue")],
)
def test_removing_what_is_not_registered(elsewhere: Path, name: str, part: str) -> None:
    models.add("alkahest", str(model_file(elsewhere / "m.safetensors")))
    with pytest.raises(UsageError) as caught:
        models.remove(name)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "meant"), [("z-imge", "z-image"), ("alkahset", "alkahest"), ("z-image-trubo", "z-image-turbo")]
)
def test_an_unknown_name_gets_the_nearest_one(elsewhere: Path, typed: str, meant: str) -> None:
    models.add("alkahest", str(model_file(elsewhere / "m.safetensors")))
    with pytest.raises(InputMissing, match=f'"{typed}"; did you mean "{meant}"'):
        models.resolve(typed)


def test_an_unknown_name_near_to_nothing_shows_where_to_look() -> None:
    with pytest.raises(InputMissing, match="mergetool models list"):
        models.resolve("qqqqqqqq")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".a", "-a", "_a", "a/b", "a\\b", "a b", "a:b", "é", "a\n", "a" * 101, "hf://a/b", "m.safetensors", "m.GGUF",
     "r.yaml", "lab.base", "a@b", "a\0"],
)  # fmt: skip
def test_a_name_that_could_be_something_else_is_refused(elsewhere: Path, name: str) -> None:
    path = model_file(elsewhere / "m.safetensors")
    with pytest.raises(UsageError):
        models.add(name, str(path))
    assert not user_file(elsewhere).exists()


@pytest.mark.parametrize("name", ["a", "0", "z-image_v1.5", "A" * 100, "a.b.c", "true", "nan", "1e5"])
def test_a_name_of_letters_digits_and_marks_is_taken(elsewhere: Path, name: str) -> None:
    path = model_file(elsewhere / "m.safetensors")
    models.add(name, str(path))
    models.add("other", str(path))
    assert models.resolve(name).path == path


def test_a_name_for_nothing_is_refused() -> None:
    with pytest.raises(InputMissing, match="does not exist"):
        models.add("m", "none.safetensors")
    with pytest.raises(UsageError, match="not an address"):
        models.add("m", "hf://only-org")


def test_a_name_whose_file_is_gone_says_so(elsewhere: Path) -> None:
    path = model_file(elsewhere / "m.safetensors")
    models.add("m", str(path))
    path.unlink()
    with pytest.raises(
        InputMissing, match=r'"m" stands for ".*m\.safetensors" in ".*models\.toml", but that does not exist'
    ):
        models.resolve("m")


# ---- the file of names


@pytest.mark.parametrize(
    "folder",
    ['q"uote', "back\\slash", "new\nline", "t\tab", "\x01\x1f", "del\x7f", "'", '"""', "日本", "😀", "\u2028", "\u0085", "# x", "a = b", "\\u0041"],
    ids=ascii,
)  # fmt: skip
def test_any_path_survives_the_quoting(elsewhere: Path, folder: str) -> None:
    path = model_file(elsewhere / folder / "m.safetensors")
    models.add("m", str(path))
    models.add("n", str(path))
    assert tomllib.loads(user_file(elsewhere).read_text("utf-8"))["models"] == {"m": str(path), "n": str(path)}
    assert models.resolve("m").path == path
    models.remove("m")
    assert models.resolve("n").path == path


def test_a_path_that_is_not_text_is_refused(elsewhere: Path) -> None:
    path = os.fsdecode(os.fsencode(elsewhere) + b"/\xff.safetensors")
    Path(path).touch()
    with pytest.raises(UsageError, match="not a path that text can spell"):
        models.add("m", path)


def test_comments_of_the_user_are_kept(elsewhere: Path) -> None:
    path = model_file(elsewhere / "m.safetensors")
    Path("mergetool.toml").write_text('# ours\n[models]\nold = "x"   # why\ngone = "y"\n')
    models.add("m", str(path), "here")
    models.remove("gone")
    assert Path("mergetool.toml").read_text() == f'# ours\n[models]\nold = "x"   # why\nm = "{path}"\n'


@pytest.mark.parametrize(
    "text",
    ['models = {old = "x", gone = "y"}\n', 'models.old = "x"\nmodels.gone = "y"\n', '[models]\nold = """\nx"""\ngone = "y"',
     "", "# nothing\n", "[models]", '[models]\nold = "x"\r\n"gone" = "y"\r\n'],
    ids=repr,
)  # fmt: skip
def test_any_layout_of_the_file_can_be_added_to(elsewhere: Path, text: str) -> None:
    path = model_file(elsewhere / "m.safetensors")
    Path("mergetool.toml").write_text(text)
    before = tomllib.loads(text).get("models", {})
    models.add("m", str(path), "here")
    assert tomllib.loads(Path("mergetool.toml").read_text())["models"] == {**before, "m": str(path)}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"[models\n", "not valid TOML"),
        (b'm = "x"\n', 'has "m", where only a section'),
        (b'[model]\nm = "x"\n', 'has "model"'),
        (b"models = 3\n", 'has "models"'),
        (b"[models]\nm = 3\n", 'name "m" no path'),
        (b'[models]\nm = ""\n', 'name "m" no path'),
        (b'[models]\na.b = "x"\n', 'name "a" no path'),
        (b'[models]\n"a/b" = "x"\n', 'name "a/b"'),
        (b'[models]\nm = "\\u0000"\n', 'name "m"'),
        (b'[models]\nm = "x"\nm = "y"\n', "not valid TOML"),
        (b"\xff", "not UTF-8"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b" " * 1_000_001, "1000001 bytes, but the limit"),
    ],
    ids=lambda text: repr(text)[:20],
)
def test_a_broken_file_of_names_is_refused_and_kept(text: bytes, part: str) -> None:
    Path("mergetool.toml").write_bytes(text)
    for use in (models.listing, lambda: models.resolve("m"), lambda: models.add("m", "mergetool.toml", "here")):
        with pytest.raises(DataError) as caught:
            use()
        assert part in str(caught.value)
        assert '"mergetool.toml"' in str(caught.value)
    assert Path("mergetool.toml").read_bytes() == text


def test_without_the_variable_the_platform_s_config_folder_is_used(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGETOOL_CONFIG_DIR", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(elsewhere / "xdg"))
    models.add("m", str(model_file(elsewhere / "m.safetensors")))
    assert (elsewhere / "xdg" / "mergetool" / "models.toml").exists()


def test_a_config_folder_that_cannot_be_made(elsewhere: Path) -> None:
    (elsewhere / "config").touch()
    with pytest.raises(OutputError, match="MERGETOOL_CONFIG_DIR"):
        models.add("m", str(model_file(elsewhere / "m.safetensors")))


# ---- addresses


@pytest.mark.parametrize(
    ("text", "repo", "inside", "revision"),
    [
        ("hf://org/repo", "org/repo", "", None),
        ("hf://org/repo/", "org/repo", "", None),
        ("hf://org/repo@v1", "org/repo", "", "v1"),
        ("hf://org/repo/transformer", "org/repo", "transformer", None),
        ("hf://org/repo/a/b/m.safetensors@refs/pr/1", "org/repo", "a/b/m.safetensors", "refs/pr/1"),
        ("hf://Org-1/re.po_2/a b (c)", "Org-1/re.po_2", "a b (c)", None),
    ],
)
def test_an_address_has_a_repository_a_place_and_a_revision(
    text: str, repo: str, inside: str, revision: str | None
) -> None:
    assert HubAddress.parse(text) == HubAddress(repo, inside, revision)
    assert HubAddress.parse(str(HubAddress.parse(text))) == HubAddress.parse(text)


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://org", "hf:///repo", "hf://org/", "hf://org//x", "hf://org/repo//x", "hf://../repo", "hf://org/..",
     "hf://org/repo/../x", "hf://org/repo/./x", "hf://org/repo/a\\b", "hf://org/repo/*", "hf://org/repo/[a]", "hf://org/repo/a?",
     "hf://org/repo@", "hf://org/repo@../../x", "hf://org/repo@/x", "hf://org/repo@a//b", "hf://org/repo@a@b", "hf://org/repo/\0",
     "hf://org/repo/\nx", "hf://user:pw@org/repo"],
    ids=ascii,
)  # fmt: skip
def test_a_malformed_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not an address on the Hub"):
        models.resolve(text)


# ---- the Hub's cache, offline


def cache(root: Path, folder: Path, *, revision: str = "main", commit: str = COMMIT) -> Path:
    """Put the files below ``folder`` into the cache as repository org/repo; returns the snapshot."""
    repo = root / "hub" / "models--org--repo"
    snapshot = repo / "snapshots" / commit
    (repo / "blobs").mkdir(parents=True, exist_ok=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def sharded(folder: Path) -> Path:
    folder.mkdir(parents=True)
    weight_map = {}
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({f"blocks.{number}.weight": numpy.full((2, 2), number, dtype=numpy.float32)}, folder / name)
        weight_map[f"blocks.{number}.weight"] = name
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"dim": 2}')
    return folder


def test_a_cached_file_opens_offline(elsewhere: Path) -> None:
    model_file(elsewhere / "repo" / "split" / "m.safetensors")
    snapshot = cache(elsewhere, elsewhere / "repo")
    assert models.resolve("hf://org/repo/split/m.safetensors").path == snapshot / "split" / "m.safetensors"
    with models.open_model("hf://org/repo/split/m.safetensors@main") as opened:
        assert opened.checkpoint.read("blocks.0.weight") == tensors()["blocks.0.weight"].tobytes()


@pytest.mark.parametrize("address", ["hf://org/repo/transformer", "hf://org/repo"])
def test_a_cached_folder_opens_offline(elsewhere: Path, address: str) -> None:
    sharded(elsewhere / "repo" / "transformer")
    (elsewhere / "repo" / "model_index.json").write_text("{}")
    cache(elsewhere, elsewhere / "repo")
    with models.open_model(address) as opened:
        assert opened.checkpoint.container == "sharded safetensors"
        assert len(opened.checkpoint.tensors) == 2
        assert opened.checkpoint.config == {"dim": 2}


def test_a_revision_is_told_from_another(elsewhere: Path) -> None:
    for number, revision in enumerate(("main", "v2"), 1):
        model_file(elsewhere / revision / "m.safetensors", number)
        cache(elsewhere, elsewhere / revision, revision=revision, commit=str(number) * 40)
    for address, value in [("hf://org/repo", 1), ("hf://org/repo@v2", 2), (f"hf://org/repo@{'2' * 40}", 2)]:
        with models.open_model(address) as opened:
            assert opened.checkpoint.read("blocks.0.weight") == tensors(value)["blocks.0.weight"].tobytes()


def test_a_registered_address_opens(elsewhere: Path) -> None:
    model_file(elsewhere / "repo" / "m.safetensors")
    cache(elsewhere, elsewhere / "repo")
    models.add("mine", "hf://org/repo")
    assert models.resolve("mine").path.name == "m.safetensors"


@pytest.mark.parametrize(
    "address", ["hf://org/none", "hf://org/none/m.safetensors", "hf://org/repo@v9", "hf://org/repo/x", "z-image"]
)
def test_what_is_not_cached_is_missing_offline(elsewhere: Path, address: str) -> None:
    model_file(elsewhere / "repo" / "m.safetensors")
    cache(elsewhere, elsewhere / "repo")
    with pytest.raises(InputMissing) as caught:
        models.resolve(address)
    assert "not in the cache, and HF_HUB_OFFLINE is set; download it once while online" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_half_cached_model_names_the_missing_shard(elsewhere: Path) -> None:
    folder = sharded(elsewhere / "repo" / "transformer")
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    cache(elsewhere, elsewhere / "repo")
    with pytest.raises(InputMissing, match=r"00002-of-00002\.safetensors"):
        models.open_model("hf://org/repo/transformer")


@pytest.mark.parametrize("name", ["m.ckpt", "m.bin", "m.pt", "m.PTH"])
def test_pickles_are_refused_before_they_are_downloaded(name: str) -> None:
    with pytest.raises(DataError, match=r"name the .safetensors file"):
        models.resolve(f"hf://org/repo/{name}")


def test_a_fresh_process_reads_the_variables_too(elsewhere: Path) -> None:
    """In-process tests give the cache by argument; here huggingface_hub reads the environment itself."""
    model_file(elsewhere / "repo" / "m.safetensors")
    snapshot = cache(elsewhere, elsewhere / "repo")
    code = (
        "import sys; from mergetool import models; print(models.resolve('hf://org/repo').path); "
        "print('torch' in sys.modules)"
    )
    root = Path(models.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert run.stdout.split() == [str(snapshot / "m.safetensors"), "False"]


# ---- the Hub, online: a double of its three functions


class Hub:
    """org/repo with these files; downloads go to the cache as links would lead there."""

    def __init__(self, root: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.source = root, files
        self.snapshot = root / "hub" / "models--org--repo" / "snapshots" / COMMIT
        self.downloaded: list[str] = []
        self.failure: Exception | None = None
        self.files = sorted(str(p.relative_to(files)) for p in files.rglob("*") if p.is_file())
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
        self._snapshot_download = self._of("snapshot_download", monkeypatch, self.snapshot_download)
        self._of("hf_hub_download", monkeypatch, self.hf_hub_download)

    def _of(self, name: str, monkeypatch: pytest.MonkeyPatch, double: Any) -> Any:
        import huggingface_hub

        original = getattr(huggingface_hub, name)
        monkeypatch.setattr(huggingface_hub, name, double)
        return original

    def list_repo_files(self, repo: str, *, revision: str | None) -> list[str]:
        assert (repo, revision) == ("org/repo", "v1")
        if self.failure is not None:
            raise self.failure
        return self.files

    def hf_hub_download(self, repo: str, name: str, *, local_files_only: bool, **_: object) -> str:
        assert not local_files_only
        if self.failure is not None:
            raise self.failure
        self.downloaded.append(name)
        target = self.snapshot / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((self.source / name).read_bytes())
        return str(target)

    def snapshot_download(self, repo: str, *, allow_patterns: list[str], local_files_only: bool, **more: Any) -> str:
        if local_files_only:
            return str(self._snapshot_download(repo, allow_patterns=allow_patterns, local_files_only=True, **more))
        for name in self.files:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_patterns) and name not in self.downloaded:
                self.hf_hub_download(repo, name, local_files_only=False)
        return str(self.snapshot)


@pytest.fixture
def online(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    repo = elsewhere / "repo"
    folder = sharded(repo / "transformer")
    model_file(folder / "other.safetensors")
    model_file(folder / "nested" / "x.safetensors")
    model_file(repo / "text_encoder" / "model.safetensors")
    model_file(repo / "all-in-one.safetensors")
    (repo / "model_index.json").write_text("{}")
    return Hub(elsewhere, repo, monkeypatch)


@pytest.mark.parametrize("address", ["hf://org/repo@v1", "hf://org/repo/transformer@v1"])
def test_only_what_the_model_needs_is_downloaded(online: Hub, address: str) -> None:
    with models.open_model(address) as opened:
        assert len(opened.checkpoint.tensors) == 2
        assert opened.checkpoint.config == {"dim": 2}
    assert sorted(Path(name).name for name in online.downloaded) == [
        "config.json",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    ]


@pytest.mark.parametrize(
    ("page", "address"),
    [
        ("https://huggingface.co/org/repo", "hf://org/repo"),
        ("https://huggingface.co/org/repo/", "hf://org/repo"),
        ("huggingface.co/org/repo/tree/main", "hf://org/repo"),
        ("https://huggingface.co/org/repo/tree/main/transformer", "hf://org/repo/transformer"),
        ("https://huggingface.co/org/repo/blob/main/a/x.safetensors", "hf://org/repo/a/x.safetensors"),
        (
            "https://huggingface.co/org/repo/resolve/main/a%20b.safetensors?download=true",
            "hf://org/repo/a b.safetensors",
        ),
        ("https://hf.co/org/repo/blob/v2/x.safetensors#L1", "hf://org/repo/x.safetensors@v2"),
        ("https://huggingface.co/org/repo/blob/refs%2Fpr%2F3/x.gguf", "hf://org/repo/x.gguf@refs/pr/3"),
    ],
)
def test_the_page_of_a_model_is_its_address(page: str, address: str) -> None:
    assert hub.address_of(page) == address
    assert str(hub.HubAddress.parse(address)) == address


def test_a_page_opens_what_it_shows(online: Hub) -> None:
    page = "https://huggingface.co/org/repo/blob/v1/all-in-one.safetensors"
    assert models.resolve(page).path == online.snapshot / "all-in-one.safetensors"
    models.add("shown", page)
    assert models.resolve("shown").path == online.snapshot / "all-in-one.safetensors"


def test_variants_on_the_hub_are_asked_about_and_their_index_can_be_named(online: Hub) -> None:
    online.files = [*online.files, "transformer/diffusion_pytorch_model.fp16.safetensors"]
    with pytest.raises(UsageError, match="2 variants of one model"):
        models.resolve("hf://org/repo@v1")
    assert not online.downloaded
    with models.open_model("hf://org/repo/transformer/diffusion_pytorch_model.safetensors.index.json@v1") as opened:
        assert len(opened.checkpoint.tensors) == 2


def test_a_file_is_downloaded_alone(online: Hub) -> None:
    assert models.resolve("hf://org/repo/all-in-one.safetensors@v1").path == online.snapshot / "all-in-one.safetensors"
    assert online.downloaded == ["all-in-one.safetensors"]


def test_several_models_are_listed_before_anything_is_downloaded(online: Hub) -> None:
    online.files = ["a.safetensors", "b.safetensors"]
    with pytest.raises(UsageError, match=r'"hf://org/repo@v1" holds 2 models \("a\.safetensors", "b\.safetensors"\)'):
        models.resolve("hf://org/repo@v1")
    assert not online.downloaded


def test_an_index_from_the_hub_cannot_name_other_files(online: Hub) -> None:
    index = online.source / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "../text_encoder/model.safetensors"}}')
    with pytest.raises(DataError, match="names the shard"):
        models.resolve("hf://org/repo/transformer@v1")
    assert [Path(name).name for name in online.downloaded] == [index.name]


def hub_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    error = kind.__new__(kind)
    Exception.__init__(error, "403 Client Error\nmore lines")
    return error


@pytest.mark.parametrize(
    ("failure", "part"),
    [
        (hub_error(errors.GatedRepoError), "accept it on its page"),
        (hub_error(errors.RepositoryNotFoundError), "no such repository, or it is private"),
        (hub_error(errors.RevisionNotFoundError), "no such revision"),
        (hub_error(errors.RemoteEntryNotFoundError), "no such file"),
        (hub_error(errors.HfHubHTTPError), "HfHubHTTPError: 403 Client Error; try again later"),
        (errors.HFValidationError("bad"), "HFValidationError: bad"),
        (OSError("No space left"), "No space left"),
        (RuntimeError("connection reset"), "connection reset"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_of_the_hub_is_one_sentence(online: Hub, failure: Exception, part: str) -> None:
    online.failure = failure
    with pytest.raises(InputMissing) as caught:
        models.resolve("hf://org/repo/all-in-one.safetensors@v1")
    assert part in str(caught.value)
    assert str(caught.value).startswith('"hf://org/repo/all-in-one.safetensors@v1" cannot be had: ')
    assert "\n" not in str(caught.value)
    if isinstance(failure, errors.HfHubHTTPError):  # a folder is listed first, and fails there
        with pytest.raises(InputMissing) as caught:
            models.resolve("hf://org/repo@v1")
        assert part in str(caught.value)


def test_without_a_network_the_cache_serves_folders(online: Hub, elsewhere: Path) -> None:
    online.failure = ConnectionError("no route to host")
    with pytest.raises(InputMissing, match="not in the cache, and the Hub cannot be reached"):
        models.resolve("hf://org/repo/transformer@v1")
    cache(elsewhere, elsewhere / "repo", revision="v1")
    with models.open_model("hf://org/repo/transformer@v1") as opened:
        assert len(opened.checkpoint.tensors) == 2


# ---- opening


def test_a_z_image_model_opens_with_its_anatomy(elsewhere: Path) -> None:
    path = families.checkpoint(elsewhere / "z.safetensors")
    models.add("z", str(path))
    with models.open_model("z") as opened:
        assert opened.name == "z"
        assert opened.anatomy.family.name == "Z-Image"
        assert opened.anatomy.layout == "comfyui"
        assert set(opened.anatomy.parts) >= {"layers.0.attention.to_q.weight"}


@pytest.mark.parametrize("name", ["blocks.0.scale_weight", "blocks.0.lora_A.weight"])
def test_what_is_not_a_plain_model_is_refused_and_closed(elsewhere: Path, name: str) -> None:
    save_file({name: numpy.ones((1, 1), dtype=numpy.float32)}, elsewhere / "m.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DataError, match=r"m\.safetensors"):
        models.open_model(str(elsewhere / "m.safetensors"))
    assert len(os.listdir("/proc/self/fd")) == before
