"""The runner of the documentation's commands notices pages that are wrong, and mends them when it is asked to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs import pages
from tests.docs.agreement import disagreement, merged
from tests.docs.pages import Page
from tests.docs.renewal import renew
from tests.docs.running import picture_fault, run


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Page]:
    monkeypatch.setattr(pages, "ROOT", tmp_path)

    def write(text: str) -> Page:
        (tmp_path / "page.md").write_text(text, "utf-8")
        return Page(tmp_path / "page.md")

    return write


def faults(page: Page, folder: Path) -> list[str]:
    folder.mkdir()
    return [*page.faults(), *filter(None, (ran.fault(page) for ran in run(page, folder)))]


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("done  0.6 s", "done  12.5 s"),
        ("41 MB/s", "3.5 GB/s".replace("GB", "MB")),
        ("memory 249 MB, disk 3.6 MB", "memory 1021 MB, disk 3.6 MB"),
        ("q   53.78 k", "q  53.79 k"),
        ("distance  5.42 %", "distance    5.41 %"),
        ("2.65e-02", "2.66e-02"),
    ],
)
def test_lines_that_say_the_same_agree(shown: str, printed: str) -> None:
    assert disagreement([shown], [printed]) == ""


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("disk 3.6 MB", "disk 3.9 MB"),
        ("161 tensors", "164 tensors"),
        ("layers.10", "layers.11"),
        ("sha256:4dd8a8a0", "sha256:4dd8a8a1"),
        ("note  moves", "warn  moves"),
        ("cfg 4", "cfg -4"),
        ("lora2", "lora3"),
    ],
)
def test_lines_that_say_something_else_disagree(shown: str, printed: str) -> None:
    assert disagreement([shown], [printed])


def test_a_line_more_is_a_difference() -> None:
    assert disagreement(["a"], ["a", "b"])
    assert disagreement(["a", "b"], ["b"])


def test_a_renewed_page_keeps_the_lines_that_agree() -> None:
    shown = ["plan 1", "done 3.1 s"]
    assert merged(shown, ["new", "plan 1", "done 9.9 s", "end"]) == ("new", "plan 1", "done 3.1 s", "end")


def test_a_page_that_shows_what_is_printed_has_no_fault(page: Callable[[str], Page], tmp_path: Path) -> None:
    text = "```console\n$ mergetool inspect lab.base | grep dtypes\n        dtypes: 161 bf16\n$ echo $?\n0\n```\n"
    assert faults(page(text), tmp_path / "run") == []


def test_a_page_that_shows_something_else_is_told_with_its_line(page: Callable[[str], Page], tmp_path: Path) -> None:
    text = "# A\n\n```console\n$ mergetool inspect lab.base | grep dtypes\n        dtypes: 161 fp16\n```\n"
    (fault,) = faults(page(text), tmp_path / "run")
    assert fault.startswith("page.md:3: $ mergetool inspect lab.base")
    assert "-        dtypes: 161 fp16" in fault
    assert "+        dtypes: 161 bf16" in fault


def test_a_command_that_fails_is_told(page: Callable[[str], Page], tmp_path: Path) -> None:
    (fault,) = faults(page("```sh\nmergetool inspect nothing.safetensors\n```\n"), tmp_path / "run")
    assert "exit code 66, wanted 0" in fault


def test_a_command_that_should_fail_and_does_not_is_told(page: Callable[[str], Page], tmp_path: Path) -> None:
    (fault,) = faults(page("<!-- fails -->\n```sh\nmergetool inspect lab.base\n```\n"), tmp_path / "run")
    assert "exit code 0, wanted another than 0" in fault


def test_commands_for_the_readers_files_run_on_stand_ins(page: Callable[[str], Page], tmp_path: Path) -> None:
    text = "```sh\nmergetool lora bake turbo style.safetensors:0.8 \\\n    -o out.safetensors\nmergetool inspect out.safetensors\n```\n"
    assert faults(page(text), tmp_path / "run") == []


def test_a_file_of_the_page_is_there_for_its_commands(page: Callable[[str], Page], tmp_path: Path) -> None:
    recipe = "models: {base: lab.base}\nmerge: 1*base\noutput: copy.safetensors\n"
    text = f"<!-- file: copy.yaml -->\n```yaml\n{recipe}```\n\n```sh\nmergetool merge copy.yaml\n```\n\n```console\n$ ls\ncopy.yaml\n```\n"
    assert faults(page(text), tmp_path / "run") == []


@pytest.mark.parametrize(
    "text",
    [
        "```\nmergetool inspect x\n```\n",
        "```text\nmergetool inspect x\n```\n",
        "```yaml\nmerge: a\n```\n",
        "<!-- file: unused.yaml -->\n```yaml\nmerge: a\n```\n",
        "<!-- not run -->\n```sh\nmergetool inspect x\n```\n",
    ],
)
def test_a_block_that_would_never_be_run_is_told(page: Callable[[str], Page], tmp_path: Path, text: str) -> None:
    assert len(faults(page(text), tmp_path / "run")) == 1


def test_a_block_that_is_not_run_with_a_reason_is_right(page: Callable[[str], Page], tmp_path: Path) -> None:
    assert faults(page("<!-- not run: it installs -->\n```sh\npip install x\n```\n"), tmp_path / "run") == []


def test_renewing_writes_what_is_printed_and_the_picture(page: Callable[[str], Page], tmp_path: Path) -> None:
    command = "python -c \"from PIL import Image; Image.new('RGB', (8, 8), 'red').save('red.png')\""
    text = f"A list:\n\n- one\n\n  ```console\n  $ {command}\n  $ ls\n  nothing\n  ```\n\n<!-- made: red.png -->\n![red](red.jpg)\n"
    found = page(text)
    assert renew(found) == []
    assert found.path.read_text("utf-8") == text.replace("nothing", "red.png")
    assert faults(Page(found.path), tmp_path / "run") == []
    assert picture_fault(found.pictures[0], tmp_path / "run") == ""


def test_a_picture_that_is_another_is_told(page: Callable[[str], Page], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "blue.png")
    (picture,) = page("<!-- made: blue.png -->\n![red](red.png)\n").pictures
    assert "is not blue.png" in picture_fault(picture, tmp_path)
