"""Other people's packages: those that are imported are listed, and one that is missing or broken is a sentence."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergetool
import mergetool_kernels
from mergetool import packages
from mergetool.errors import PackageError
from mergetool.packages import PACKAGES, Package
from tests import absent

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SOURCES = (Path(mergetool.__file__).parent, Path(mergetool_kernels.__file__).parent)
IMPORTED = [package for package in PACKAGES if package.modules]


def imports(source: str) -> Iterator[str]:
    """The top modules that a source imports, for types alone or not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}  # type: ignore[index]


def test_every_package_that_the_source_imports_is_in_the_table_and_no_other() -> None:
    found = {name for folder in SOURCES for path in folder.rglob("*.py") for name in imports(path.read_text("utf-8"))}
    others = found - set(sys.stdlib_module_names) - {"mergetool", "mergetool_kernels"}
    assert others == {module for package in PACKAGES for module in package.modules}


def test_the_project_asks_for_the_packages_of_the_table_and_no_other() -> None:
    plain = {package.name.lower().replace("_", "-") for package in PACKAGES if not package.extra}
    assert names(PROJECT["dependencies"]) == plain
    for extra in ("gguf", "gpu", "upscale"):
        assert names(PROJECT["optional-dependencies"][extra]) == {p.name for p in PACKAGES if p.extra == extra}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_the_command_that_installs_a_package_asks_for_the_versions_of_the_project(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, extras = PROJECT["dependencies"], PROJECT["optional-dependencies"]
    required = [
        *plain,
        *(f"{line}; extra == '{extra}'" for extra in ("dev", "gguf", "gpu", "upscale") for line in extras[extra]),
    ]
    monkeypatch.setattr(packages, "_required", lambda: required)
    lines = extras[package.extra] if package.extra else plain
    (wanted,) = [line.partition(";")[0].strip() for line in lines if re.match(rf"{package.name}\b", line)]
    assert packages.install(package) == f'{sys.executable} -m pip install "{wanted}"'


def required(package: Package, env: dict[str, str]) -> str:
    """What an error of needing the package says, in a process of its own."""
    code = (
        "from mergetool import errors, packages\n"
        f"try: packages.require({package.name!r})\n"
        "except errors.PackageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("package", IMPORTED, ids=lambda p: p.name)
def test_a_missing_package_is_a_sentence_with_the_command_that_installs_it(package: Package, tmp_path: Path) -> None:
    said = required(package, absent.environment(tmp_path, absent=package.modules))
    assert said == (
        f"the package {package.name} is not installed, which {package.uses} need; install it: {packages.install(package)}"
    )


@pytest.mark.parametrize("error", ["OSError", "ImportError", "RuntimeError"])
@pytest.mark.parametrize("package", IMPORTED, ids=lambda p: p.name)
def test_a_broken_package_is_a_sentence_with_its_reason_and_the_command_that_mends_it(
    package: Package, error: str, tmp_path: Path
) -> None:
    said = required(package, absent.environment(tmp_path, broken=package.modules, error=error))
    assert said == (
        f"the package {package.name} is installed and cannot be imported ({error}: libbroken.so: cannot open shared object file: "
        f"No such file or directory), which {package.uses} need; mend it: {packages.reinstall(package)}"
    )


def own_module(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of mergetool's with this code, which is run."""
    (folder / "trial.py").write_text(code)
    monkeypatch.setattr(mergetool, "__path__", [*mergetool.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "mergetool.trial", raising=False)
    with packages.told():
        __import__("mergetool.trial")


def other_module(folder: Path, name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another people's module with this code, in place of one that may be there."""
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_an_error_of_a_module_of_our_own_stays_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"mergetool\.nothing"):
        own_module(tmp_path, "import mergetool.nothing", monkeypatch)
    with pytest.raises(ImportError, match=r"cannot import name 'nothing' from 'mergetool\.errors'"):
        own_module(tmp_path, "from mergetool.errors import nothing", monkeypatch)


def test_an_error_of_our_own_code_is_not_blamed_on_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="no such disk"):
        own_module(tmp_path, "import numpy\nraise OSError('no such disk')", monkeypatch)


def test_an_error_of_calling_a_package_is_not_one_of_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_module(tmp_path, "torchsde", "def tree(): raise OSError('disk')", monkeypatch)
    with pytest.raises(OSError, match="disk"):
        own_module(tmp_path, "import torchsde\ntorchsde.tree()", monkeypatch)


def test_a_package_without_a_package_that_it_needs_is_brought_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_module(tmp_path, "torchsde", "import sympathetic", monkeypatch)
    with pytest.raises(
        PackageError, match=r"torchsde is installed and cannot be imported \(ModuleNotFoundError: .*sympathetic"
    ) as told:
        own_module(tmp_path, "import torchsde", monkeypatch)
    assert str(told.value).endswith(f"mend it: {packages.install(packages.named('torchsde'))}")


def test_a_package_that_misses_another_of_the_table_names_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_module(
        tmp_path, "torchsde", "raise ModuleNotFoundError(\"No module named 'scipy'\", name='scipy')", monkeypatch
    )
    with pytest.raises(PackageError, match=r"^the package scipy is not installed"):
        own_module(tmp_path, "import torchsde", monkeypatch)


def test_a_name_that_an_old_version_lacks_asks_for_a_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_module(tmp_path, "torchsde", "", monkeypatch)
    monkeypatch.setattr(packages, "installed", lambda name: "0.1.9")
    with pytest.raises(PackageError, match=r"torchsde is version 0\.1\.9, and samplers .* need torchsde>=0\.2\.6"):
        own_module(tmp_path, "from torchsde import BrownianTree", monkeypatch)


def test_a_name_that_a_new_enough_version_lacks_has_it_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_module(tmp_path, "torchsde", "", monkeypatch)
    with pytest.raises(PackageError, match=r"lacks what samplers .*BrownianTree.*force-reinstall"):
        own_module(tmp_path, "from torchsde import BrownianTree", monkeypatch)


def test_an_import_that_fails_when_it_is_first_used_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers and transformers import their parts when they are asked for, and raise a RuntimeError from what came of it."""
    lazy = (
        "import importlib\n"
        "def __getattr__(name):\n"
        "    try: importlib.import_module('torchsde_part')\n"
        "    except OSError as error: raise RuntimeError('Failed to import') from error\n"
    )
    other_module(tmp_path, "torchsde", lazy, monkeypatch)
    other_module(tmp_path, "torchsde_part", "raise OSError('libpart.so: no such file')", monkeypatch)
    with pytest.raises(PackageError, match=r"torchsde is installed and cannot be imported \(OSError: libpart"):
        own_module(tmp_path, "import torchsde\ntorchsde.BrownianTree", monkeypatch)
