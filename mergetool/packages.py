"""The packages of other people that mergetool imports, and the sentence for a missing one.

`told` is the one place where an error of importing such a package becomes a sentence with the command that mends it. Errors of importing
mergetool's own modules stay what they are.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import TracebackType

from mergetool.errors import PackageError

_OWN = ("mergetool", "mergetool_kernels")


@dataclass(frozen=True, slots=True)
class Package:
    """A package by the name that pip knows it by.

    ``uses`` are what needs it, in the plural. ``extra`` is the group of optional dependencies that brings it, "" for the plain install. ``modules`` are
    what Python imports of it, none of one that other packages import for us.
    """

    name: str
    uses: str
    modules: tuple[str, ...]
    extra: str = ""


PACKAGES: tuple[Package, ...] = (
    Package("diffusers", "pictures", ("diffusers",)),
    Package("google-re2", "patterns that select tensors", ("re2",)),
    Package("huggingface_hub", "models on the Hugging Face Hub", ("huggingface_hub",)),
    Package("jinja2", "HTML reports and prompts", ("jinja2",)),
    Package("matplotlib", "plots", ("matplotlib",)),
    Package("numpy", "all commands that read models", ("numpy",)),
    Package("pillow", "pictures", ("PIL",)),
    Package("platformdirs", "registered names", ("platformdirs",)),
    Package("pydantic", "recipes and the command line", ("pydantic", "pydantic_core")),
    Package("pyyaml", "recipe files", ("yaml",)),
    Package("safetensors", "pictures", ()),
    Package("scipy", "beta schedules", ("scipy",)),
    Package("tomlkit", "changes to registered names", ("tomlkit",)),
    Package("torch", "merge methods, LoRAs, pictures and GPUs", ("torch",)),
    Package("torchsde", "samplers that add noise", ("torchsde",)),
    Package("tqdm", "progress bars", ("tqdm",)),
    Package("transformers", "prompts and CLIP scores", ("transformers",)),
    Package("typer", "all commands", ("typer",)),
    Package("gguf", "GGUF files", ("gguf",), "gguf"),
    Package("spandrel", "upscalers", ("spandrel",), "upscale"),
    Package("triton", "merges on a GPU", ("triton",), "gpu"),
)

_BY_MODULE = {module: package for package in PACKAGES for module in package.modules}


def requirement(package: Package) -> str:
    """The package with the versions that this mergetool works with, as ``torch>=2.8``.

    It is the name alone where mergetool was not installed by pip.
    """
    for line in _required():
        wanted, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", wanted)
        extra = re.search(r"""extra == ['"]([\w.-]+)['"]""", marker)
        if name and _folded(name[0]) == _folded(package.name) and (extra[1] if extra else "") == package.extra:
            return wanted.strip()
    return package.name


def installed(name: str) -> str | None:
    """The version of an installed package, from its metadata: nothing is imported. None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_too_old(package: Package) -> bool:
    """Whether the installed version is below the one that is needed."""
    least = re.search(r">=\s*([\d.]+)", requirement(package))
    found = installed(package.name)
    return bool(least and found) and _numbers(found or "") < _numbers(least[1] if least else "")


def pip(*arguments: str) -> str:
    """The command that runs pip for this Python.

    Words that a shell would read otherwise are in quotation marks that all shells know.
    """
    words = [sys.executable or "python", "-m", "pip", "install", *arguments]
    return " ".join(f'"{word}"' if re.search(r"[\s<>=;&()\[\]]", word) else word for word in words)


def install(package: Package) -> str:
    """The command that installs a package, or brings it to the version that is needed."""
    return pip(requirement(package))


def reinstall(package: Package) -> str:
    """The command that mends a package whose files are damaged.

    It leaves the packages that this one needs alone.
    """
    return pip("--force-reinstall", "--no-deps", requirement(package))


def named(name: str) -> Package:
    """The package of that name."""
    return next(package for package in PACKAGES if package.name == name)


def missing(package: Package, needs: str = "") -> PackageError:
    """The error that ``needs`` (else the package's uses) need a package that is not installed."""
    return PackageError(
        f"the package {package.name} is not installed, which {needs or package.uses} need; install it: {install(package)}"
    )


def require(name: str, needs: str = "") -> None:
    """Import a package before work begins that needs it. Raises PackageError."""
    package = named(name)
    try:
        for module in package.modules:
            importlib.import_module(module)
    except Exception as error:
        told_of = explained(error, needs)
        if told_of is None:
            raise
        raise told_of from error


@contextmanager
def told() -> Iterator[None]:
    """Make a PackageError of an error of importing one of these packages within the block.

    Every other error stays.
    """
    try:
        yield
    except Exception as error:
        told_of = explained(error)
        if told_of is None:
            raise
        raise told_of from error


def explained(error: Exception, needs: str = "") -> PackageError | None:
    """Make of an error the sentence on a package that is missing, too old or cannot be imported.

    None for every other error.
    """
    if isinstance(error, PackageError):
        return None
    blamed, below = _frames(error)
    package = _BY_MODULE.get(blamed)
    absent = _missing_module(error)
    if absent in _OWN:
        return None
    if absent in _BY_MODULE:
        return missing(_BY_MODULE[absent], needs if _BY_MODULE[absent] is package or package is None else "")
    if not below and isinstance(error, ImportError) and _top(error.name) in _BY_MODULE:
        package = _BY_MODULE[_top(error.name)]
        return _lacking(package, str(error), needs)
    if package is None or not (isinstance(error, ImportError) or _is_importing(error)):
        return None
    mend = install(package) if absent else reinstall(package)
    return PackageError(
        f"the package {package.name} is installed and cannot be imported ({_reason(error)}), which {needs or package.uses} need; mend it: {mend}"
    )


def _lacking(package: Package, reason: str, needs: str) -> PackageError:
    """A module is there and a name in it is not: another version, or half of a package."""
    found = installed(package.name)
    if found is None or is_too_old(package):
        version = f"version {found}" if found else "of no known version"
        return PackageError(
            f"the package {package.name} is {version}, and {needs or package.uses} need {requirement(package)}; install it: {install(package)}"
        )
    return PackageError(
        f"the package {package.name} {found} lacks what {needs or package.uses} need ({_short(reason)}); mend it: {reinstall(package)}"
    )


def _frames(error: BaseException) -> tuple[str, bool]:
    """The top module that the last of our frames called into, "" for none, and whether there are frames below that one."""
    below: list[str] = []
    for module, _ in _called(error.__traceback__):
        if module in _OWN:
            below = []
        elif module not in sys.stdlib_module_names:
            below.append(module)
    return (below[0] if below else "", bool(below))


def _is_importing(error: BaseException) -> bool:
    """Whether an error, or one that caused it, came out of the body of another package's module below our last frame."""
    importing = False
    for module, function in _called(error.__traceback__):
        if module in _OWN:
            importing = False
        elif module not in sys.stdlib_module_names and function == "<module>":
            importing = True
    return importing or (error.__cause__ is not None and _is_importing(error.__cause__))


def _called(trace: TracebackType | None) -> Iterator[tuple[str, str]]:
    """Top module and function of each frame, the outermost first."""
    while trace is not None:
        frame = trace.tb_frame
        yield _top(frame.f_globals.get("__name__")), frame.f_code.co_name
        trace = trace.tb_next


def _missing_module(error: BaseException | None) -> str:
    """The top module that an error, or one that caused it, did not find; "" for none."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return _top(error.name)
        error = error.__cause__
    return ""


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_short(str(error))}"


def _short(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else "without a reason"


def _top(module: object) -> str:
    return module.partition(".")[0] if isinstance(module, str) else ""


def _folded(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _required() -> Sequence[str]:
    try:
        return metadata.requires("mergetool") or ()
    except metadata.PackageNotFoundError:
        return ()
