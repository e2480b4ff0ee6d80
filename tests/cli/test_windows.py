"""Commands under Windows' rules (`tests.windows`) and on consoles with code pages; nothing here ran on Windows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergetool import models
from mergetool.cli import console
from tests.adapters.spellings import SPELLINGS
from tests.cli.run import Ran, mergetool, warm
from tests.families import checkpoint
from tests.patience import HANG

COMMANDS = {
    "merge": ("merge", "a.safetensors + 0.5*(b.safetensors - a.safetensors)", "--force"),
    "merge into FP8": ("merge", "0.5*a.safetensors + 0.5*b.safetensors", "--force", "--quant", "fp8-scaled"),
    "merge by windows": ("merge", "0.5*a.safetensors + 0.5*b.safetensors", "--force", "--reader", "mmap"),
    "merge that can be resumed": ("merge", "0.5*a.safetensors + 0.5*b.safetensors", "--force", "--resume"),
    "convert": ("convert", "a.safetensors", "--dtype", "fp32"),
    "diff": ("diff", "--base", "a.safetensors", "--variant", "b.safetensors", "--rank", "4"),
    "bake": ("lora", "bake", "a.safetensors", "lora.safetensors"),
    "resize": ("lora", "resize", "lora.safetensors", "--rank", "1"),
    "lora convert": ("lora", "convert", "lora.safetensors"),
    "a recipe": ("merge", "r.yaml"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    checkpoint(folder / "a.safetensors")
    checkpoint(folder / "b.safetensors", variant=1)
    SPELLINGS["musubi"]().save(folder).rename(folder / "lora.safetensors")
    (folder / "r.yaml").write_text("models: {a: a.safetensors}\nmerge: 0.5*a + 0.5*a\nverify: weights\n")
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path) -> Path:
    for file in inputs.iterdir():
        if file.is_file():
            os.link(file, tmp_path / file.name)
    return tmp_path


def on_windows(*arguments: object, cwd: Path) -> Ran:
    done = warm().run(arguments, cwd, patched="windows")
    return Ran(done.code, done.out, done.err)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_is_replaced_while_nothing_of_it_is_open(command: str, here: Path) -> None:
    """The bytes are those of this system, and nothing is left beside them."""
    before = {path.name for path in here.iterdir()}
    asked = (*COMMANDS[command], "--overwrite", "-o")
    for out in ("here", "there", "there"):
        ran = (mergetool if out == "here" else on_windows)(*asked, f"{out}.safetensors", cwd=here)
        assert ran.code == 0, ran.err
    assert (here / "there.safetensors").read_bytes() == (here / "here.safetensors").read_bytes()
    assert {path.name for path in here.iterdir()} - before - {"config"} == {"here.safetensors", "there.safetensors"}


@pytest.mark.parametrize("command", ["merge", "diff", "bake", "a recipe"])
@pytest.mark.parametrize("name", ["nul.safetensors", "a:b.safetensors", "COM1"])
def test_a_name_that_windows_cannot_have_is_one_sentence(command: str, name: str, here: Path) -> None:
    before = {path.name for path in here.iterdir()}
    ran = on_windows(*COMMANDS[command], "-o", name, cwd=here)
    assert ran.code not in (0, 1)
    assert ran.err.startswith("mergetool: ")
    assert ran.err.count("\n") == 1
    assert "device" in ran.err or 'the character ":"' in ran.err
    assert {path.name for path in here.iterdir()} - before <= {"config"}


def test_such_a_name_is_written_here_with_a_note(here: Path) -> None:
    ran = mergetool(*COMMANDS["merge"], "-o", "nul.safetensors", cwd=here)
    assert ran.code == 0, ran.err
    assert 'note    Windows cannot have "nul.safetensors", because Windows takes it for a device' in ran.out
    assert (here / "nul.safetensors").exists()


def test_the_input_under_a_name_in_another_case_is_the_input(here: Path) -> None:
    """Where case is ignored both names lead to one file, as a hard link's do here."""
    os.link(here / "a.safetensors", here / "A.safetensors")
    ran = on_windows(*COMMANDS["merge"], "-o", "A.safetensors", "--overwrite", cwd=here)
    assert ran.code == 73, ran.err
    assert 'is the input "a.safetensors" itself; choose another output name' in ran.err


@pytest.mark.parametrize(
    "path", ["C:\\models\\new\\a.safetensors", "\\\\nas\\models\\a.safetensors", "D:a.safetensors"]
)
def test_a_path_of_windows_is_a_model_of_an_expression(path: str, here: Path) -> None:
    """Its backslashes are no escapes; here it is an ordinary name."""
    (here / "a.safetensors").rename(here / path)
    ran = mergetool("merge", f"0.5*'{path}' + 0.5*b.safetensors", "-o", "out.safetensors", "--force", cwd=here)
    assert ran.code == 0, ran.err
    assert mergetool("inspect", path, cwd=here).code == 0
    assert mergetool("models", "add", "mine", path, cwd=here).code == 0
    assert path.removeprefix("\\\\") in mergetool("models", "list", cwd=here).out.replace("\\\\", "\\")
    assert mergetool("inspect", "mine", cwd=here).code == 0


def test_a_path_in_double_quotes_of_a_names_file_is_answered_with_how_it_is_written(here: Path) -> None:
    (here / "mergetool.toml").write_text('[models]\nmine = "C:\\models\\a.safetensors"\n')
    ran = mergetool("inspect", "mine", cwd=here)
    assert ran.code != 0
    assert "a path with backslashes stands in single quotes" in ran.err
    (here / "mergetool.toml").write_text("[models]\nmine = 'C:\\models\\a.safetensors'\n")
    assert "C:\\" in mergetool("models", "list", cwd=here).out.replace("\\\\", "\\")


# ---- consoles


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_what_a_code_page_lacks_is_escaped_and_no_command_fails(encoding: str, here: Path) -> None:
    name = "żółw-模型-é.safetensors"
    (here / "a.safetensors").rename(here / name)
    env = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict", "MERGETOOL_CONFIG_DIR": str(here)}
    for arguments, code in ((["inspect", name], 0), (["inspect", f"no {name}"], 66), (["merge", "--help"], 0)):
        command = [sys.executable, "-m", "mergetool", *arguments]
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, timeout=HANG, check=False)
        said = done.stdout.decode(encoding) + done.stderr.decode(encoding)
        assert done.returncode == code, said
        assert "Traceback" not in said
        assert name.encode(encoding, "backslashreplace").decode(encoding) in said or arguments[0] == "merge"


def test_ctrl_break_ends_a_command_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGBREAK is Windows' alone: here a number that Linux has another name for."""
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    monkeypatch.setattr(
        console, "_signals", console._Signals()
    )  # an earlier run in this process may have left its own deferred
    kept = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    }
    try:
        with pytest.raises(SystemExit) as ended:
            console.run(lambda: os.kill(os.getpid(), signal.SIGUSR1) or time.sleep(HANG))
        assert ended.value.code == 128 + signal.SIGUSR1
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_a_system_without_its_signals_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = signal.getsignal(signal.SIGINT)
    for name in ("SIGTERM", "SIGHUP"):
        monkeypatch.delattr(signal, name)
    ran = []
    try:
        console.run(lambda: ran.append(models.embedded()))
    finally:
        signal.signal(signal.SIGINT, kept)
    assert ran
