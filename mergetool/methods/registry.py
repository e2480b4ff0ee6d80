"""The register of merge methods, and what one says about itself.

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
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from mergetool.errors import UsageError
from mergetool.ops.program import Value
from mergetool.ops.rounding import stream_key

if TYPE_CHECKING:
    from torch import Tensor

Takes = Literal["models", "deltas", "any"]
"""Whether the arguments are models, differences of models, or all models or all differences; so is the result."""

FAMILIES: tuple[str, ...] = (
    "affine", "agreement", "algebra", "bounded", "center", "gated", "smoothing", "sparse", "spherical",
)  # fmt: skip
"""The modules of this room that hold methods."""

GROUP = "mergetool.methods"


@dataclass(frozen=True, slots=True)
class Site:
    """Which parameter of the model the tensors are, by its canonical name: all that randomness may depend on, with a seed."""

    part: str

    def key(self, seed: int, argument: int = 0) -> int:
        """The 64-bit key of the random numbers for one argument of a method here: no two parameters, nor arguments, share it."""
        return stream_key(seed, f"{self.part}\0{argument}")


@dataclass(frozen=True, slots=True)
class Range:
    """The bounds of a number, both included, and what it is."""

    low: float = -float("inf")
    high: float = float("inf")
    text: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """What a flag, a choice or a list of numbers is."""

    text: str


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method: ``kind`` is float, int, bool, str (one of ``choices``) or tuple (numbers, one an argument)."""

    name: str
    kind: type
    default: object
    low: float
    high: float
    choices: tuple[str, ...]
    text: str

    def wanted(self) -> str:
        """What it may be, in words."""
        if self.kind is bool:
            return "True or False"
        if self.kind is str:
            return " or ".join(repr(choice) for choice in self.choices)
        if self.kind is tuple:
            return "a list of numbers, one an argument, as in [1, 0.5]"
        what = "a whole number" if self.kind is int else "a number"
        if self.low == -float("inf"):
            return what
        return f"{what} from {self.low:g}" + ("" if self.high == float("inf") else f" to {self.high:g}")

    @property
    def shown(self) -> str:
        """The default as it would be written."""
        return f"{float(self.default):g}" if isinstance(self.default, Fraction | float) else repr(self.default)

    def accepts(self, value: Value, arguments: int) -> bool:
        """Whether a method with this many arguments can be given the value."""
        if self.kind is bool:
            return isinstance(value, bool)
        if self.kind is str:
            return value in self.choices
        if self.kind is tuple:
            return isinstance(value, tuple) and len(value) == arguments
        if isinstance(value, bool) or not isinstance(value, Fraction):
            return False
        return self.low <= value <= self.high and (self.kind is not int or value.denominator == 1)


@dataclass(frozen=True)
class Method:
    """A registered merge method.

    ``function`` takes the arguments (float32 tensors of one shape, which it may overwrite), the ``Site`` and its parameters by
    name; it returns a float32 tensor of that shape. An affine one has ``factors`` instead: from the number of arguments
    and its parameters, as exact fractions, to the factor of each argument. At least ``least`` and at most ``most`` arguments. ``buffers(n)`` is how
    many more float32 tensors of the arguments' size it holds at once with n of them.
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

    def apply(self, tensors: Sequence[Tensor], site: Site, parameters: Mapping[str, Value]) -> Tensor:
        """What the method makes of the tensors, all of one shape and dtype."""
        assert self.function is not None
        return self.function(tensors, site, **{name: _plain(self[name], value) for name, value in parameters.items()})

    def __getitem__(self, name: str) -> Parameter:
        return next(parameter for parameter in self.parameters if parameter.name == name)

    @property
    def signature(self) -> str:
        """As it is called: ``ties(delta1, delta2, ..., density=0.2)``."""
        noun = {"models": "model", "deltas": "delta", "any": "x"}[self.takes]
        shown = [f"{noun}{i + 1}" if self.most != 1 else noun for i in range(self.least)]
        shown += ["..."] if self.most is None else [f"{noun}{i + 1}" for i in range(self.least, self.most)]
        return f"{self.name}({', '.join([*shown, *(f'{p.name}={p.shown}' for p in self.parameters)])})"


def _plain(parameter: Parameter, value: Value) -> object:
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
    """Register a function that gives the factor of each argument, for a method that is a sum of its arguments."""

    def register(function: Callable[..., Sequence[Fraction]]) -> Callable[..., Sequence[Fraction]]:
        _register(function, {"takes": takes, "least": least, "most": most, "factors": function})
        return function

    return register


def _register(function: Callable[..., Any], facts: Mapping[str, Any]) -> None:
    name = function.__name__
    found = Method(name=name, parameters=_parameters(function), **(_texts(function) | dict(facts)))
    if name in _registered:
        raise TypeError(f'the merge method "{name}" is registered twice')
    _registered[name] = found


def _texts(function: Callable[..., Any]) -> dict[str, Any]:
    texts: dict[str, Any] = {}
    field = "summary"
    for line in inspect.cleandoc(function.__doc__ or "").splitlines():
        head, colon, rest = line.partition(":")
        if not line.strip():
            field = ""
        elif colon and head in ("Formula", "Source"):
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
    if kind not in (float, int, bool, str, tuple) or given.default is inspect.Parameter.empty:
        raise TypeError(f'the parameter "{given.name}" of a merge method has no usable type or no default')
    return Parameter(given.name, kind, given.default, low, high, choices, text.text)


def methods() -> Mapping[str, Method]:
    """Every method by name, those of installed packages too."""
    _load_families()
    for entry in _installed():
        _load(entry)
    return MappingProxyType(dict(sorted(_registered.items())))


def find(name: str) -> Method:
    """The method of that name. Raises UsageError, with the nearest name, where there is none."""
    _load_families()
    if name not in _registered:
        for entry in _installed():
            if entry.name == name:
                _load(entry)
    if name in _registered:
        return _registered[name]
    known = sorted({*_registered, *(entry.name for entry in _installed()), "lora"})
    near = get_close_matches(name, known, n=1)
    advice = f'did you mean "{near[0]}"?' if near else "`mergetool methods` lists them."
    raise UsageError(f'no merge method "{name}" is registered; {advice}')


def _load_families() -> None:
    for family in FAMILIES:
        import_module(f"mergetool.methods.{family}")


@cache
def _installed() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda entry: entry.name)


def _load(entry: EntryPoint) -> None:
    """Import the package that gives a method. Raises UsageError where it cannot be, or registers something else."""
    if entry.name in _registered:
        return
    try:
        entry.load()
    except Exception as error:
        raise UsageError(f'the merge method "{entry.name}" of {entry.value} cannot be loaded: {error}.') from None
    if entry.name not in _registered:
        raise UsageError(f'{entry.value} does not register the merge method "{entry.name}" that it is installed for.')
