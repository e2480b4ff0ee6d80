"""The register of merge methods, and the description of each.

    @method(takes="deltas")
    def halves(tensors: Sequence[Tensor], site: Site, *, share: Share = 0.5) -> Tensor:
        \"\"\"One line of what it does.

        Formula: result = share * x1
        Source: where the formula is from
        \"\"\"

with ``Share = Annotated[float, Range(0, 1, "what it is")]``. Parameters are read from the signature, texts from the docstring.
Installed packages add methods by the entry point ``mergetool.methods``, a name and a function that ``method`` decorates.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fractions import Fraction
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from mergetool.errors import PackageError, UsageError
from mergetool.ops.program import ParameterValue
from mergetool.ops.rounding import stream_key
from mergetool.packages import explained

if TYPE_CHECKING:
    from torch import Tensor

Takes = Literal["models", "deltas", "any"]
"""Whether the arguments are models, differences of models, or all models or all differences; so is the result."""

FAMILIES: tuple[str, ...] = (
    "affine", "agreement", "algebra", "bounded", "center", "gated", "smoothing", "sparse", "spherical",
)  # fmt: skip
"""The modules of this room that hold methods."""

GROUP = "mergetool.methods"

LARGEST = 2**127
"""The largest factor of a float32."""


@dataclass(frozen=True, slots=True)
class Site:
    """The parameter of the model that the tensors are, by its canonical name.

    With a seed, that is all that randomness may depend on.
    """

    part: str

    def key(self, seed: int, argument: int = 0) -> int:
        """The 64-bit key of the random numbers for one argument of a method here.

        No two parameters, nor arguments, share it.
        """
        return stream_key(seed, f"{self.part}\0{argument}")


@dataclass(frozen=True, slots=True)
class Range:
    """The bounds of a number, both included, and its meaning."""

    low: float = -float("inf")
    high: float = float("inf")
    text: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """The meaning of a flag, a choice or a list of numbers."""

    text: str


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method.

    ``kind`` is float, int, bool, str (one of ``choices``) or tuple (numbers, one an argument).
    """

    name: str
    kind: type
    default: object
    low: float
    high: float
    choices: tuple[str, ...]
    text: str

    def wanted(self) -> str:
        """The values that it may have, in words."""
        if self.kind is bool:
            return "True or False"
        if self.kind is str:
            return " or ".join(repr(choice) for choice in self.choices)
        if self.kind is tuple:
            return "a list of numbers, one an argument, as in [1, 0.5]"
        noun = "a whole number" if self.kind is int else "a number"
        low = "" if self.low == -float("inf") else f" from {self.low:g}"
        return noun + low + ("" if self.high == float("inf") else f" to {self.high:g}")

    @property
    def shown(self) -> str:
        """The default as it would be written; [...] where it depends on the number of arguments."""
        if self.default == ():
            return "[...]"
        return f"{float(self.default):g}" if isinstance(self.default, Fraction | float) else repr(self.default)

    def accepts(self, value: ParameterValue, arguments: int) -> bool:
        """Whether a method with this many arguments can be given the value."""
        if self.kind is bool:
            return isinstance(value, bool)
        if self.kind is str:
            return value in self.choices
        if self.kind is tuple:
            return isinstance(value, tuple) and len(value) == arguments and all(map(_is_float, value))
        if isinstance(value, bool) or not isinstance(value, Fraction):
            return False
        return self.low <= value <= self.high and (value.denominator == 1 if self.kind is int else _is_float(value))


def _is_float(value: Fraction) -> bool:
    """Whether a number is one that a tensor can be multiplied by without losing it."""
    return abs(value) <= LARGEST


@dataclass(frozen=True)
class Method:
    """A registered merge method.

    ``function`` takes the arguments (float32 tensors of one shape, which it may overwrite), the ``Site`` and its parameters by
    name; it returns a float32 tensor of that shape. An affine one has ``factors`` instead: from the number of arguments
    and its parameters, as exact fractions, to the factor of each argument. At least ``least`` and at most ``most`` arguments. ``buffers(n)`` is how
    many more float32 tensors of the arguments' size it holds at once with n of them. ``package`` is the installed package that gives it, "" for
    mergetool's own.
    """

    name: str
    takes: Takes
    least: int
    most: int | None
    parameters: tuple[Parameter, ...]
    summary: str
    formula: str
    source: str
    function: Callable[..., Tensor] | None = None
    factors: Callable[..., Sequence[Fraction]] | None = None
    buffers: Callable[[int], float] = lambda arguments: 2 + arguments
    package: str = ""

    def apply(self, tensors: Sequence[Tensor], site: Site, parameters: Mapping[str, ParameterValue]) -> Tensor:
        """Apply the method to the tensors, all of one shape and dtype."""
        assert self.function is not None
        return self.function(tensors, site, **{name: _plain(self[name], value) for name, value in parameters.items()})

    def __getitem__(self, name: str) -> Parameter:
        return next(parameter for parameter in self.parameters if parameter.name == name)

    @property
    def signature(self) -> str:
        """The method with its parameters: ``ties(delta1, delta2, ..., density=0.2)``."""
        noun = {"models": "model", "deltas": "delta", "any": "x"}[self.takes]
        shown = [f"{noun}{i + 1}" if self.most != 1 else noun for i in range(self.least)]
        shown += ["..."] if self.most is None else [f"{noun}{i + 1}" for i in range(self.least, self.most)]
        return f"{self.name}({', '.join([*shown, *(f'{p.name}={p.shown}' for p in self.parameters)])})"

    @property
    def example(self) -> str:
        """A merge of the embedded models by it, every parameter at its default."""
        count = max(self.least, min(2, self.most or 2))
        arguments = ["lab.alkahest", "lab.striped", "lab.hollow", "lab.turbo"][:count]
        arguments += ["base=lab.base"] if self.takes == "deltas" else []
        values = (f"[{', '.join('1' * count)}]" if p.kind is tuple else p.shown for p in self.parameters)
        given = [f"{p.name}={value}" for p, value in zip(self.parameters, values, strict=True)]
        return f"{self.name}({', '.join([*arguments, *given])})"


def _plain(parameter: Parameter, value: ParameterValue) -> object:
    if isinstance(value, tuple):
        return tuple(float(number) for number in value)
    return parameter.kind(value) if isinstance(value, Fraction) else value


_registered: dict[str, Method] = {}


def method(
    *, takes: Takes, least: int = 1, most: int | None = None, buffers: Callable[[int], float] | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function of tensors under its own name. Raises TypeError for a signature or docstring that says too little."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        facts = {} if buffers is None else {"buffers": buffers}
        _register(function, {"takes": takes, "least": least, "most": most, "function": function, **facts})
        return function

    return register


def affine(
    *, takes: Takes, least: int = 1, most: int | None = None
) -> Callable[[Callable[..., Sequence[Fraction]]], Callable[..., Sequence[Fraction]]]:
    """Register a function that gives the factor of each argument of a sum."""

    def register(function: Callable[..., Sequence[Fraction]]) -> Callable[..., Sequence[Fraction]]:
        _register(function, {"takes": takes, "least": least, "most": most, "factors": function})
        return function

    return register


def _register(function: Callable[..., Any], facts: Mapping[str, Any]) -> None:
    name = function.__name__
    wanted = 2 if "function" in facts else 1
    positional = [
        each for each in inspect.signature(function).parameters.values() if each.kind is not each.KEYWORD_ONLY
    ]
    if len(positional) != wanted or name == "lora":
        shown = "(tensors, site, *, ...)" if wanted == 2 else "(count, *, ...)"
        raise TypeError(f'the merge method "{name}" is not a function {shown} of a name that is free')
    registered = Method(name=name, parameters=_parameters(function), **(_texts(function) | dict(facts)))
    if name in _registered:
        raise TypeError(f'the merge method "{name}" is registered twice')
    _registered[name] = registered


def _texts(function: Callable[..., Any]) -> dict[str, Any]:
    texts: dict[str, Any] = {}
    field = "summary"
    for line in inspect.cleandoc(function.__doc__ or "").splitlines():
        head, colon, rest = line.partition(":")
        if not line.strip():
            field = ""
        elif colon and head in ("Formula", "Source") and head.lower() not in texts:
            field = head.lower()
            texts[field] = rest.strip()
        elif field:
            texts[field] = f"{texts[field]} {line.strip()}" if field in texts else line.strip()
    missing = {"summary", "formula", "source"} - set(texts)
    if missing:
        raise TypeError(f'the merge method "{function.__name__}" does not say its {", ".join(sorted(missing))}')
    return texts


def _parameters(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    hints = typing.get_type_hints(function, include_extras=True, localns={"Tensor": Any})
    return tuple(
        _parameter(given, hints[given.name])
        for given in inspect.signature(function).parameters.values()
        if given.kind is inspect.Parameter.KEYWORD_ONLY
    )


def _parameter(given: inspect.Parameter, hint: Any) -> Parameter:
    kind, *notes = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    text = next((note for note in notes if isinstance(note, Range | Text)), Text(""))
    low, high = (text.low, text.high) if isinstance(text, Range) else (-float("inf"), float("inf"))
    choices: tuple[str, ...] = ()
    if typing.get_origin(kind) is Literal:
        kind, choices = str, typing.get_args(kind)
    elif kind is Fraction:
        kind = float
    elif typing.get_origin(kind) is tuple:
        kind = tuple
    if kind not in (float, int, bool, str, tuple) or given.default is inspect.Parameter.empty or given.name == "base":
        raise TypeError(
            f'the parameter "{given.name}" of a merge method has no usable type, no default or the name base'
        )
    return Parameter(given.name, kind, given.default, low, high, choices, text.text)


def methods() -> Mapping[str, Method]:
    """Every method by name, with those of installed packages. Raises UsageError where one of these cannot be loaded."""
    listed, errors = listing()
    if errors:
        raise UsageError(errors[0])
    return MappingProxyType({method.name: method for method in listed})


def listing() -> tuple[list[Method], list[str]]:
    """Every method, in order of names, with sentences on those that cannot be loaded.

    These are methods of installed packages.
    """
    _load_families()
    errors = []
    for name in dict.fromkeys(entry.name for entry in _installed()):
        try:
            _load(name)
        except (UsageError, PackageError) as error:
            errors.append(str(error))
    return [_registered[name] for name in sorted(_registered)], errors


def find(name: str) -> Method:
    """The method of that name; only the package that gives it is imported. Raises UsageError, with the nearest name, where there is none."""
    _load_families()
    if name in _registered:
        return _registered[name]
    installed = [entry.name for entry in _installed()]
    if name in installed:
        return _load(name)
    near = get_close_matches(name, sorted({*_registered, *installed, "lora"}), n=1)
    advice = f'did you mean "{near[0]}"?' if near else "`mergetool methods` lists them."
    raise UsageError(f'no merge method "{name}" is registered; {advice}')


def _load_families() -> None:
    for family in FAMILIES:
        import_module(f"mergetool.methods.{family}")


@cache
def _installed() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, _package(entry)))


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _load(name: str) -> Method:
    """Import the package that gives a method. Raises PackageError where it needs a package of mergetool that is missing, UsageError where it cannot be, where it registers something else, and for a name that is taken."""
    given = [entry for entry in _installed() if entry.name == name]
    entry, packages = given[0], [_package(entry) for entry in given]
    known = _registered.get(name)
    if len(given) > 1 or (known and not known.package):
        others = packages if len(given) > 1 else [*packages, "mergetool"]
        raise UsageError(f'the merge method "{name}" is given by {" and by ".join(others)}; uninstall all but one.')
    if known:
        return known
    before = set(_registered)
    try:
        entry.load()
    except Exception as error:
        for partial in set(_registered) - before:
            del _registered[partial]
        absent = explained(error)
        if absent is not None:  # a package of mergetool's own, and the one that gives the method is as good as before
            raise absent from None
        raise UsageError(
            f'the merge method "{name}" of the package {packages[0]} cannot be loaded: {error} ({type(error).__name__}); '
            "update or uninstall it."
        ) from None
    for new in set(_registered) - before:
        _registered[new] = replace(_registered[new], package=packages[0])
    if name not in _registered:
        raise UsageError(
            f'the package {packages[0]} does not register the merge method "{name}" in {entry.value}; update or uninstall it.'
        )
    return _registered[name]
