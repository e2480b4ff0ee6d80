"""What may stand in a recipe file: the keys, their types and what they mean, as pydantic models and as a JSON schema.

Every field says what its option on the command line says; `docs/recipes.md` has them with examples. Texts in an output may hold
``{NAME}`` for the value of a variable, and a number may be written as ``"{NAME}"``: variables are put in before these models
look at an output, so that they see plain values.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema

VARIABLE = r"[A-Za-z_][A-Za-z0-9_]{0,49}"
MAX_TEXT = 100_000

_BY_NAME = {"type": "string", "pattern": rf"^\{{{VARIABLE}\}}$"}

Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)]
Patterns = Text | Annotated[list[Text], Field(min_length=1, max_length=1000)]
Number = Annotated[int | Decimal, WithJsonSchema({"anyOf": [{"type": "number"}, _BY_NAME]})]
Count = Annotated[
    int, Field(ge=0, le=2**31 - 1), WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, _BY_NAME]})
]
Size = Annotated[
    Annotated[int, Field(gt=0, lt=2**63)] | Text,
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "examples": ["300MB", "4GiB"]}]}),
]
Value = Number | Text

Dtype = Literal["bf16", "fp16", "fp32", "fp8_e4m3", "fp8_e5m2"]
Container = Literal["fp8-scaled", "int8", "nvfp4", "mxfp8"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=False)


class Pictures(_Strict):
    """How `mergetool verify` looks at an output; what is left out is its own default."""

    pictures: bool = Field(True, description="Make pictures, or stop after the weights.")
    refiner: Text | None = Field(None, description="The model of the second stage: a name under models, or lab.NAME.")
    strength: Number | Text | None = Field(None, description="Of the second stage; several as a text: 0.1,0.15,0.25.")
    strength_as: Literal["comfyui", "diffusers"] = "comfyui"
    refine_steps: Count = Field(4, description="Steps of the second stage.")
    steps: Count = Field(30, description="Steps of the first stage.")
    guidance: Number = Field(3, description="Guidance of the first stage, as diffusers counts it.")
    shift: Number | None = Field(None, description="Schedule shift; the anchor's, else 3.")
    prompts: Text | None = Field(None, description="A file with a prompt a line.")
    seeds: Count | Text | None = Field(None, description="Seeds for every prompt: 0, or a text: 1,2,3 or 1-8.")
    size: Text | None = Field(None, description="WIDTHxHEIGHT; the model's.")
    pipeline: Text | None = Field(None, description="The model to take text encoder and VAE from.")
    text_encoder: Text | None = Field(None, description="Folder or file of the text encoder.")
    tokenizer: Text | None = Field(None, description="Its tokenizer.")
    vae: Text | None = Field(None, description="File or folder of the VAE.")


class Difference(_Strict):
    """A difference LoRA, as `mergetool diff` takes it."""

    base: Text = Field(description="The model the LoRA will be loaded on: a name under models, an output, or lab.NAME.")
    variant: Text = Field(description="The model that base + LoRA should become.")
    variant2: Text | None = Field(None, description="Keep what the differences to both variants have in common.")
    union: bool = Field(False, description="With variant2: both, and what they share only once.")
    weights: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = Field(
        None, description="With union: how much of what each has alone."
    )
    orthogonal: bool = Field(False, description="With variant2: what of variant is orthogonal to it.")
    rank: Count = Field(0, description="The same rank for every matrix; 0 chooses by rank_thresh.")
    rank_thresh: Number | None = Field(None, description="What to keep of each matrix, as rule says. [0.95]")
    rank_max: Count | None = Field(None, description="Largest rank of a matrix; 0 for no cap. [64; 0 with budget]")
    rule: Literal["energy", "fro", "sum", "ratio", "abs", "knee"] = "energy"
    budget: Size | None = Field(None, description="Size of the file: the ranks with the least total error.")
    min_dim: Count = Field(32, description="Leave out matrices with fewer rows or columns.")
    include: Patterns | None = Field(None, description="Take only these.")
    exclude: Patterns | None = Field(None, description="Leave these out.")
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="What the factors are stored in.")
    seed: Count = Field(0, description="Seed of the random starting directions.")


class MergeOutput(_Strict):
    """A merged checkpoint."""

    merge: Text = Field(description="The expression, as in: alkahest + m * (tuned - base).")
    output: Text | None = Field(None, description="The file, NAME.safetensors, or NAME/ for a folder.")
    protect: Patterns | None = Field(None, description="Groups or patterns taken bit for bit from the anchor.")
    include: Patterns | None = Field(None, description="Merge only these.")
    exclude: Patterns | None = Field(None, description="Do not merge these.")
    keep_from: Text | None = Field(
        None, alias="from", description="Take protected and excluded tensors from this model."
    )
    set: Annotated[dict[Text, Value], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="Multipliers by group or pattern; a later one wins."
    )
    dtype: Dtype | None = Field(None, description="The output's dtype; the anchor's.")
    quant: Container | None = Field(None, description="Container of the large matrices.")
    scale_search: bool = Field(False, description="Search each tensor's scale for the least squared error.")
    layout: Literal["comfyui", "diffusers"] | None = Field(None, description="The anchor's.")
    bundled: Literal["keep", "drop", "drop-ema", "merge"] = Field(
        "keep",
        description="The anchor's VAE, text encoders, EMA weights and the like: copied, left out, or merged.",
    )
    rounding: Literal["nearest", "stochastic", "error-feedback"] = "nearest"
    seed: Count = Field(0, description="Seed of stochastic rounding.")
    shard_size: Size | None = Field(None, description="Write a folder of shards no larger than this, as in 5GB.")
    verify: bool | Literal["weights", "pictures"] | Pictures = Field(
        False, description="Check it as `mergetool verify` does: weights alone, or with pictures."
    )


class LoraOutput(_Strict):
    """A difference LoRA."""

    diff: Difference
    output: Text | None = Field(None, description="The file, NAME.safetensors.")


_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")]
_Variable = Annotated[str, StringConstraints(pattern=rf"^{VARIABLE}$")]


class Heading(_Strict):
    """What stands beside the outputs."""

    models: dict[_Name, Text] = Field(
        default={},
        description="Names for models and LoRAs: a path from this file, hf://org/repo, lab.NAME, a registered name.",
    )
    variables: dict[_Variable, Value] = Field(
        default={}, description="Variables and their values, which the command line or a caller can set."
    )
    sweep: dict[_Variable, Annotated[list[Value], Field(min_length=1, max_length=256)]] = Field(
        default={}, description="Variables with several values: every output that uses one is made once for each."
    )


class Several(Heading):
    """A recipe of several outputs. A later output may use an earlier one by its name, as a model."""

    outputs: Annotated[dict[_Name, MergeOutput | LoraOutput], Field(min_length=1, max_length=256)]


class OneMerge(Heading, MergeOutput):
    """A recipe of one merge, whose keys stand beside the models."""


class OneLora(Heading, LoraOutput):
    """A recipe of one difference LoRA, whose keys stand beside the models."""


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors: what it accepts has the right keys and types, no more."""
    from pydantic.json_schema import models_json_schema

    kinds = (OneMerge, Several, OneLora)
    named, schema = models_json_schema(
        [(kind, "validation") for kind in kinds], title="mergetool recipe", ref_template="#/$defs/{model}"
    )
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["anyOf"] = [named[kind, "validation"] for kind in kinds]
    return schema
