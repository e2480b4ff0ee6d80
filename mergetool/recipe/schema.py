"""The keys of a recipe file, their types and meanings, as pydantic models and a JSON schema.

The keys of an output are made from the rows of the table of options: a row says its key, its type, its default and what it does, and refuses a value
with the sentence of every face. `docs/reference/recipes.md` has them with examples. Texts in an output may hold ``{NAME}`` for the value of a
variable, and a number may be written as ``"{NAME}"``: variables are put in before these models look at an output, so that they see plain values.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema, WrapValidator, create_model
from pydantic_core import PydanticCustomError

from mergetool.errors import UsageError
from mergetool.options import kinds
from mergetool.options.differences import DiffOptions
from mergetool.options.merging import MergeOptions
from mergetool.options.pictures import Seeds, Sides, Strengths
from mergetool.options.running import ShardOptions
from mergetool.options.table import Row, Table, named, rows_in, spelled
from mergetool.options.verifying import LookOptions

VARIABLE = r"[A-Za-z_][A-Za-z0-9_]{0,49}"
MAX_TEXT = 100_000

_BY_NAME = {"type": "string", "pattern": rf"^\{{{VARIABLE}\}}$"}

_Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)]
_Patterns = _Text | Annotated[list[_Text], Field(min_length=1, max_length=1000)]
_Number = Annotated[int | Decimal, WithJsonSchema({"anyOf": [{"type": "number"}, _BY_NAME]})]
Count = Annotated[
    int, Field(ge=0, le=2**31 - 1), WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, _BY_NAME]})
]
_Size = Annotated[
    Annotated[int, Field(gt=0, lt=2**63)] | _Text,
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "examples": ["300MB", "4GiB"]}]}),
]
_Value = _Number | _Text


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=False)


def _typed(kind: kinds.Kind) -> Any:
    """The type of a key's value."""
    match kind:
        case kinds.Flag():
            return bool
        case kinds.Choice():
            return Literal[kind.words]
        case kinds.Integer():
            by_value = {"type": "integer", "minimum": kind.least}
            return Annotated[int, Field(ge=kind.least, le=kind.most), WithJsonSchema({"anyOf": [by_value, _BY_NAME]})]
        case kinds.Number() | kinds.Share():
            return _Number
        case Seeds():
            return int | _Text | list[int]
        case Strengths():
            return _Number | _Text | list[_Number]
        case Sides():
            return _Text | Annotated[list[int], Field(min_length=2, max_length=2)]
        case kinds.Size():
            return _Size
        case kinds.Patterns():
            return _Patterns
        case kinds.Settings():
            return Annotated[dict[_Text, _Value], Field(min_length=1, max_length=1000)]
        case kinds.TwoNumbers():
            return Annotated[list[_Number], Field(min_length=2, max_length=2)]
        case kinds.String(empty=True):
            return Annotated[str, StringConstraints(max_length=MAX_TEXT)]
    return _Text


def _refusing(row: Row) -> Any:
    """A validator that refuses the same as the row, in its words, before the type is checked."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            taken = row.value(value)
        except UsageError as error:
            raise PydanticCustomError("option", "{sentence}", {"sentence": str(error)}) from None
        return handler(taken if isinstance(row.option.kind, kinds.Choice) else value)

    return WrapValidator(check)


def _described(row: Row) -> str:
    """The meaning of a key and of its default, with other options by their keys."""

    def key(name: str, value: str | None) -> str:
        other = named(name)
        return f"{other.key if other else name}{'' if value is None else f': {value}'}"

    default = f" [default: {row.option.default}]" if row.option.default else ""
    return spelled(row.option.help + default, key)


def _of(*tables: type[Table]) -> Any:
    """A model whose keys are the rows that a recipe has."""
    fields: dict[str, Any] = {}
    for row in (row for table in tables for row in rows_in(table, "recipe").values()):
        default = None if isinstance(row.option.kind, kinds.Settings) else row.initial
        kind = _typed(row.option.kind)
        kind = kind | None if default in (None, ()) else kind
        said = Field(default, alias=row.key if row.key != row.name else None, description=_described(row))
        # Of several values the one that is wrong has a place of its own, which the type knows.
        has_places = row.option.kind.many or isinstance(row.option.kind, kinds.TwoNumbers)
        fields[row.name] = (kind if has_places else Annotated[kind, _refusing(row)], said)
    return create_model("Rows", __base__=_Strict, **fields)


class PicturesSpec(_of(LookOptions)):  # type: ignore[misc]
    """The look of `mergetool verify` at an output; missing keys take its defaults."""


class DiffSpec(_of(DiffOptions)):  # type: ignore[misc]
    """A difference LoRA, as `mergetool diff` takes it."""

    base: _Text = Field(
        description="The model the LoRA will be loaded on: a name under models, an output, or lab.NAME."
    )
    variant: _Text = Field(description="The model that base + LoRA should become.")


class MergeOutput(_of(MergeOptions, ShardOptions)):  # type: ignore[misc]
    """A merged checkpoint."""

    merge: _Text = Field(description="The expression, as in: alkahest + m * (tuned - base).")
    output: _Text | None = Field(None, description="The file, NAME.safetensors, or NAME/ for a folder.")
    verify: bool | Literal["weights", "pictures"] | PicturesSpec = Field(
        False, description="Check it as `mergetool verify` does: weights alone, or with pictures."
    )


class LoraOutput(_Strict):
    """A difference LoRA."""

    diff: DiffSpec
    output: _Text | None = Field(None, description="The file, NAME.safetensors.")


_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")]
_Variable = Annotated[str, StringConstraints(pattern=rf"^{VARIABLE}$")]


class Heading(_Strict):
    """The keys beside the outputs."""

    models: dict[_Name, _Text] = Field(
        default={},
        description="Names for models and LoRAs: a path from this file, hf://org/repo, lab.NAME, a registered name.",
    )
    variables: dict[_Variable, _Value] = Field(
        default={}, description="Variables and their values, which the command line or a caller can set."
    )
    sweep: dict[_Variable, Annotated[list[_Value], Field(min_length=1, max_length=256)]] = Field(
        default={}, description="Variables with several values: every output that uses one is made once for each."
    )


class SeveralOutputs(Heading):
    """A recipe of several outputs. A later output may use an earlier one by its name, as a model."""

    outputs: Annotated[dict[_Name, MergeOutput | LoraOutput], Field(min_length=1, max_length=256)]


class OneMerge(Heading, MergeOutput):
    """A recipe of one merge, whose keys stand beside the models."""


class OneLora(Heading, LoraOutput):
    """A recipe of one difference LoRA, whose keys stand beside the models."""


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors. It checks keys and types only."""
    from pydantic.json_schema import models_json_schema

    kinds = (OneMerge, SeveralOutputs, OneLora)
    named, schema = models_json_schema(
        [(kind, "validation") for kind in kinds], title="mergetool recipe", ref_template="#/$defs/{model}"
    )
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["anyOf"] = [named[kind, "validation"] for kind in kinds]
    return schema
