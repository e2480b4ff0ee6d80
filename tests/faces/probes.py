"""Requests that some face might take and another refuse, made in every face that has their options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import mergetool
from mergetool.cli.main import app
from mergetool.comfyui import NODE_CLASS_MAPPINGS
from mergetool.errors import MergetoolError
from tests.faces.walk import CALLED, NODES, faces

NAN = float("nan")

Request = Mapping[str, Any]
REQUESTS: dict[str, list[Request]] = {
    "merge": [
        *({"dtype": word} for word in ("fp7", "BF16", "")),
        {"quant": "int3"},
        {"layout": "flat"},
        {"rounding": "up"},
        *({"seed": number} for number in (-1, 2**70)),
        *({"shard_size": size} for size in (-1, 0)),
        *({"threads": number} for number in (-1, 0, 1000)),
        *({"device": word} for word in ("tpu", "cuda:x", "cuda:")),
        {"non_finite": "maybe"},
        {"protect": ["nosuchgroup"]},
        {"exclude": ["re:("]},
        *(
            {"multipliers": {group: value}}
            for group, value in (("nosuch", 1), ("layers", NAN), ("layers", "cubic(0,1)"))
        ),
        {"dtype": "bf16", "quant": "int8"},
        {"scale_search": True},
        {"seed": 3},
        {"keep_from": "nowhere.safetensors"},
    ],
    "diff": [
        {"rank": -1},
        *({"rank_thresh": share} for share in (0.0, 1.5, -1.0, NAN)),
        {"rank_max": -1},
        {"rule": "most"},
        {"budget": -1},
        {"min_dim": -1},
        *({"dtype": word} for word in ("fp8_e4m3", "fp7")),
        {"seed": -1},
        *({"threads": number} for number in (-1, 0, 1000)),
        *({"device": word} for word in ("tpu", "cuda:x")),
        {"rule": "ratio"},
        {"rule": "abs"},
        {"rule": "knee", "rank_thresh": 0.5},
        {"budget": 100_000, "rank_thresh": 0.5},
        {"budget": 100_000, "rank": 4},
        {"rank": 4, "rank_thresh": 0.5},
        {"rank": 4, "rule": "fro"},
        {"exclude": ["nosuchgroup"]},
        {"union": True},
        {"orthogonal": True},
    ],
    "compare": [
        *({"target": size} for size in (0.0, -1.0, NAN)),
        *({"multiplier": text} for text in ("much", "nan")),
        {"dtype": "fp7"},
        *({"threads": number} for number in (-1, 0, 1000)),
        {"exclude": ["nosuchgroup"]},
    ],
}

GIVEN: dict[str, Request] = {
    "merge": {"expression": "alk + 0.5*(a - b)"},
    "diff": {"base": "alk.safetensors", "variant": "a.safetensors"},
    "compare": {"base": "alk.safetensors", "variant": "a.safetensors"},
}
FILES = {name: f"{name}.safetensors" for name in ("alk", "a", "b")}


def answers(operation: str, request: Request, folder: Path) -> dict[str, str]:
    """What each face that has these options does: ``takes it``, ``refuses it``, or ends in the name of an exception."""
    found = faces(operation)
    able = [face for face in found if set(request) <= set(found[face])]
    return {face: _answer(face, operation, request, folder) for face in able}


def _answer(face: str, operation: str, request: Request, folder: Path) -> str:
    try:
        return {"command": _command, "API": _api, "recipe": _recipe, "node": _node}[face](operation, request, folder)
    except MergetoolError:
        return "refuses it"
    except Exception as error:
        return f"ends in {type(error).__name__}"


def _command(operation: str, request: Request, folder: Path) -> str:
    words = [operation]
    for name, value in (GIVEN[operation] | request).items():
        flag = {"non_finite": "--nonfinite", "multipliers": "--set", "keep_from": "--from"}.get(
            name, f"--{name}"
        ).replace("_", "-")
        if name == "expression":
            words.append(_expression(value))
        elif operation == "compare" and name in ("base", "variant"):
            words.append(value)
        elif isinstance(value, bool):
            words.append(flag)
        elif isinstance(value, Mapping):
            words += [f"{flag}={group}={number}" for group, number in value.items()]
        else:
            words += [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
    words += [] if operation == "compare" else ["--overwrite", "-o", str(folder / "command.safetensors")]
    words += ["--force"] if operation == "merge" else []
    ended = CliRunner().invoke(app, words)
    if isinstance(ended.exception, SystemExit | None):
        return "refuses it" if ended.exit_code else "takes it"
    raise ended.exception


def _api(operation: str, request: Request, folder: Path) -> str:
    given = dict(GIVEN[operation] | request)
    if operation == "merge":
        given["expression"] = _expression(given["expression"])
        given |= {"force": True}
    if operation != "compare":
        given |= {"output": folder / "api.safetensors", "overwrite": True}
    getattr(mergetool, operation)(**given)
    return "takes it"


def _recipe(operation: str, request: Request, folder: Path) -> str:
    names = {name: spelled for spelled, name in CALLED["recipe"].items()}
    given = {names.get(name, name): value for name, value in (GIVEN[operation] | request).items()}
    if operation == "diff":
        given = {
            "diff": {
                name: FILES.get(str(value).split(".")[0], value) if name in ("base", "variant") else value
                for name, value in given.items()
            }
        }
    path = folder / "recipe.yaml"
    path.write_text(_yaml({"models": FILES, "output": "recipe.safetensors", **given}))
    mergetool.Recipe(path).make(folder, force=True, overwrite=True)
    return "takes it"


def _node(operation: str, request: Request, folder: Path) -> str:
    cls: Any = NODE_CLASS_MAPPINGS[NODES[operation]]
    names = {name: spelled for spelled, name in CALLED["node"].items()}
    inputs = {name: how for group in cls.INPUT_TYPES().values() for name, how in group.items()}
    given = {name: _default(*how) for name, how in inputs.items()}
    for name, value in (GIVEN[operation] | request).items():
        given[names.get(name, name)] = _widget(names.get(name, name), value)
    for name, value in given.items():
        kind, how = inputs[name]
        inside = how.get("min", value) <= value <= how.get("max", value) if kind in ("INT", "FLOAT") else True
        if not inside or (isinstance(kind, list) and value not in kind):
            return "refuses it"  # ComfyUI does, before it asks the node
    given |= {"force": True} if operation == "merge" else {}
    given |= {"overwrite": True, "name": "node.safetensors"} if operation != "compare" else {}
    getattr(cls(), cls.FUNCTION)(**{name: value for name, value in given.items() if value is not None})
    return "takes it"


def _default(kind: Any, how: Mapping[str, Any]) -> Any:
    return how.get("default", kind[0] if isinstance(kind, list) else None)


def _widget(name: str, value: Any) -> Any:
    """A value as it stands in the node's input."""
    if name == "model":
        return _expression(value)
    if name in ("base", "variant"):
        return f"'{value}'"
    if isinstance(value, Mapping):
        return "\n".join(f"{group}={number}" for group, number in value.items())
    return " ".join(value) if isinstance(value, list) else value


def _expression(text: str) -> str:
    for name, file in FILES.items():
        text = (
            text.replace(name, f"'{file}'")
            if name == "alk"
            else text.replace(f"({name} ", f"('{file}' ").replace(f" {name})", f" '{file}')")
        )
    return text


def _yaml(value: Any) -> str:
    """JSON, which YAML is, with YAML's word for what is no number."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_yaml(key)}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return ".nan" if value != value else str(value) if isinstance(value, int | float) else f'"{value}"'
