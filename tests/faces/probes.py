"""Values that no option takes, and options that contradict each other, asked of every face."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from mergetool.cli import console
from mergetool.cli.main import app
from mergetool.comfyui import NODE_CLASS_MAPPINGS, host
from mergetool.errors import MergetoolError, UsageError
from mergetool.options import kinds
from mergetool.options.comparing import Conditions, Multiplied
from mergetool.options.table import Face, Row, rows, rows_in
from mergetool.recipe import file
from mergetool.recipe.validation import as_keys
from tests.faces.walk import NODES, RECIPES, Operation

Asked = Mapping[str, Any]

TOGETHER: Mapping[str, list[Asked]] = {
    "merge": [
        {"seed": 3},
        {"rounding": "error-feedback", "seed": 3},
        {"multipliers": {"layers": "cubic(0,1)"}},
        {"multipliers": {"layers": "much"}},
    ],
    "diff": [
        {"rule": "ratio"},
        {"rule": "abs"},
        {"rule": "knee", "rank_thresh": 0.5},
        {"rank_thresh": 1.5},
        {"budget": 100_000, "rank_thresh": 0.5},
        {"budget": 100_000, "rank": 4},
        {"rank": 4, "rank_thresh": 0.5},
        {"rank": 4, "rule": "fro"},
        {"union": True},
        {"orthogonal": True},
        {"union": True, "orthogonal": True, "variant2": "lab.base"},
        {"full_layer": ["ffn"]},
    ],
}
"""What is wrong only together, or in a way of its own."""

ENOUGH: Mapping[str, Asked] = {"lora resize": {"rank": 4}}
"""What an operation asks for beside what has no default."""


def wrong(row: Row) -> list[Any]:
    """Values that a row refuses, as a program would give them."""
    match row.option.kind:
        case kinds.Choice():
            return ["nosuch", "", f"{row.option.kind.words[0]}x"]
        case kinds.Integer(least=least, most=most):
            return [least - 1, most + 1, "many"]
        case kinds.DeviceName():
            return ["gpu", "cuda:x", "cuda:"]
        case kinds.Number(least=least, above=above):
            return ["much", max(least, above) - 1] if max(least, above) > -1e9 else ["much"]
        case kinds.Share():
            return [0, "-1%", "much"]
        case kinds.Size():
            return [0, "5 apples"]
        case Multiplied():
            return [0, "much"]
        case Conditions():
            return [["distance"], ["much>1"]]
    return []


def probes(operation: Operation) -> Iterator[Asked]:
    """Every request that all faces of an operation refuse."""
    enough = ENOUGH.get(operation.name, {})
    for name, row in rows(operation.table).items():
        yield from ({**enough, name: value} for value in wrong(row))
    yield from TOGETHER.get(operation.name, [])


def answers(operation: Operation, asked: Asked) -> dict[Face, str]:
    """What each face that has the options says, spelled as the API spells it; "takes it" where nothing is refused."""
    found: dict[Face, str] = {}
    asking: dict[Face, Any] = {"command": _command, "api": _api}
    asking |= {"recipe": _recipe} if operation.table in RECIPES else {}
    asking |= {"node": _node} if operation.table in NODES else {}
    for face, ask in asking.items():
        if asked.keys() <= rows_in(operation.table, face).keys():
            found[face] = ask(operation, asked)
    return found


def _api(operation: Operation, asked: Asked) -> str:
    needed = {
        name: ["lab.base"] if rows(operation.table)[name].option.kind.many else "lab.base" for name in operation.needed
    }
    try:
        operation.table(**needed | dict(asked))
    except UsageError as error:
        return str(error)
    return "takes it"


def wanted(face: Face, sentence: str) -> str:
    """A sentence of the API as a face says it, without quotes, which stand around what was text."""
    spell = {"command": console.spelled, "api": str, "recipe": as_keys, "node": host.spelled}[face]
    return plain(spell(sentence))


def plain(sentence: str) -> str:
    """``sentence`` without quotes."""
    return sentence.replace('"', "").replace("'", "")


def _command(operation: Operation, asked: Asked) -> str:
    typed = operation.name.split()
    known = rows(operation.table)
    typed += [text for name in operation.needed for text in _typed(known[name], "lab.base")]
    typed += [text for name, value in asked.items() for text in _typed(known[name], value)]
    if "dry_run" in known:
        typed.append("--dry-run")
    ran = CliRunner().invoke(app, typed)
    return ran.output.strip().removeprefix("mergetool: ") if ran.exit_code == 2 else f"ends in {ran.exit_code}"


def _typed(row: Row, value: Any) -> list[str]:
    if value is True:
        return [row.flag]
    values = [f"{key}={inner}" for key, inner in value.items()] if isinstance(value, Mapping) else value
    texts = values if isinstance(values, list) else [str(values)]
    return texts if row.option.argument else [f"{row.flag}={text}" for text in texts]


def _recipe(operation: Operation, asked: Asked) -> str:
    known = rows(operation.table)
    keys = "".join(f", {known[name].key}: {_yaml(value)}" for name, value in asked.items())
    if operation.name == "diff":
        text = f"diff: {{base: lab.base, variant: lab.turbo{keys}}}"
    elif operation.name == "verify":
        text = f"merge: lab.base\nverify: {{{keys[2:]}}}"
    else:
        text = f"outputs: {{out: {{merge: lab.base{keys}}}}}"
    try:
        file.read(text.encode(), Path("r.yaml"))
    except MergetoolError as error:
        place, colon, sentence = str(error).partition(": ")
        assert colon
        assert place.startswith("r.yaml:")
        return sentence
    return "takes it"


def _node(operation: Operation, asked: Asked) -> str:
    node: Any = NODE_CLASS_MAPPINGS[NODES[operation.table]]
    inputs = {name: how for group in node.INPUT_TYPES().values() for name, how in group.items()}
    held = {name: how.get("default") for name, (_, how) in inputs.items() if "default" in how}
    held |= {"output": "out.safetensors"} if "output" in inputs else {}
    said = node.VALIDATE_INPUTS(**held | {name: _widget(value) for name, value in asked.items()})
    return "takes it" if said is True else str(said)


def _widget(value: Any) -> Any:
    """A value as it stands in the node's input."""
    if isinstance(value, Mapping):
        return "\n".join(f"{group}={number}" for group, number in value.items())
    return "\n".join(value) if isinstance(value, list) else value


def _yaml(value: Any) -> str:
    """JSON, which YAML is."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_yaml(key)}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else f'"{value}"'
