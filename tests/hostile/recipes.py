"""Recipe files that carry a hostile text: as every kind of value, as names, as YAML that would be more than data, and by ``--var``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

MODELS = "models: {a: a.safetensors, b: small-a.safetensors, c: small-b.safetensors}\n"
MERGE = "merge: a + 2 * (b - c)\n"
FOLDER = "made"
"""Where the outputs go; nothing else of the working folder may change."""
HOME = "/nonexistent/home-of-the-user"
"""What the environment says during these runs, and nothing that is printed may say."""


def recipes(text: str) -> Iterator[str]:
    """Recipes with ``text`` in a place where something else is wanted of it, or nothing more than a text."""
    quoted = json.dumps(text)
    both = MODELS + MERGE
    model = f"a + 2 * (b - {quoted})"
    yield f"{MODELS}merge: {quoted}\n"
    yield f"{MODELS}merge: {json.dumps(model)}\n"
    yield f"{both}protect: [{quoted}]\n"
    yield f"{both}include: {quoted}\nexclude: [{quoted}]\n"
    yield f"{both}from: {quoted}\n"
    yield f"{both}set: {{{quoted}: 1}}\n"
    yield f"{both}set: {{layers: {quoted}}}\n"
    yield f"{both}output: {quoted}\n"
    yield f"{both}dtype: {quoted}\nshard_size: {quoted}\n"
    yield f"{both}shard_size: {quoted}\n"
    yield f"{both}{quoted}: 1\n"
    yield f'{both}variables: {{t: {quoted}}}\noutput: "{{t}}-{{t}}.safetensors"\nprotect: "{{t}}"\n'
    yield f"{MODELS}variables: {{t: {quoted}}}\nmerge: a + 2 * (b - t)\n"
    yield f'{MODELS}sweep: {{t: [{quoted}, b]}}\nmerge: a + 2 * (t - c)\noutput: "{{t}}.safetensors"\n'
    yield f"{both}variables: {{{quoted}: 1}}\n"
    yield f"{MODELS}outputs: {{{quoted}: {{merge: a}}}}\n"
    yield f"models: {{a: a.safetensors, {quoted}: b.safetensors}}\nmerge: a + 2 * ({quoted} - a)\n"
    yield f"{MODELS}diff: {{base: a, variant: {quoted}, budget: {quoted}}}\n"
    yield f"{both}verify: {{pictures: false, prompts: {quoted}, size: {quoted}, tokenizer: {quoted}}}\n"
    if "hf://" not in text:  # the user's own hf:// may be fetched
        yield f"models: {{a: a.safetensors, x: {quoted}}}\nmerge: a + 2 * (x - a)\n"
    yield f"{MODELS}merge: {text}\n"
    yield f"{MODELS}merge: &t {text}\noutput: *t\n"
    yield f"{MODELS}merge: !!python/object/apply:eval [{quoted}]\n"
    yield f"{both}protect: !!python/name:{re.sub(r'[^A-Za-z0-9_.]', '', text)} ''\n"
    yield f"{both}variables: {{t: !<tag:yaml.org,2002:python/object/new:os.system> [{quoted}]}}\n"
    yield f"{text}\n"


def texts_of_yaml() -> Iterator[str]:
    """What some reader of YAML makes an object, a module, another file or the environment of."""
    tags = [
        "!!python/object/apply:os.system ['touch canary']", "!!python/object/new:os.system ['touch canary']",
        "!!python/object/apply:builtins.eval ['open(\"canary\", \"w\")']", "!!python/module:__hello__ ''", "!!python/name:this.s ''",
        "!!python/object:subprocess.Popen {args: [touch, canary]}", "!!python/tuple [a]", "!!js/function 'function () {}'", "!ruby/object:Gem {}",
        "!include b.yaml", "!include http://127.0.0.1:9/b.yaml", "!ENV ${HOME}", "!env_var HOME", "!!timestamp 2026-01-01", "!!binary YQ==",
        "!Ref a", "! a", "!<tag:yaml.org,2002:python/module:this> ''",
    ]  # fmt: skip
    for tag in tags:
        yield f"{MODELS}merge: {tag}\n"
        yield f"{MODELS}{MERGE}variables: &x {{t: {tag}}}\nset: *x\n"
        yield f"{tag}\n"
    yield f"%TAG ! tag:yaml.org,2002:python/object/apply:\n---\n{MODELS}merge: !os.system ['touch canary']\n"
    yield f"{MODELS}{MERGE}---\n!!python/object/apply:os.system ['touch canary']\n"
    yield f"{MODELS}base: &x {{merge: a}}\n<<: *x\n"
    yield f"{MODELS}<<: !!python/object/apply:os.system ['touch canary']\n{MERGE}"
    yield f"{MODELS}? !!python/object/apply:os.system ['touch canary']\n: 1\n{MERGE}"
    yield "models: {a: $HOME/a.safetensors, b: ~/b.safetensors}\nmerge: a + (b - a)\n"
    yield f'{MODELS}{MERGE}output: "${{HOME}}.safetensors"\nprotect: "%HOME%"\n'


def _commands(folder: Path, name: str, content: str, *more: str) -> list[list[str]]:
    """A dry run of a recipe, and the run."""
    (folder / name).write_text(content, encoding="utf-8", errors="surrogatepass")
    line = ["merge", name, "-o", FOLDER, *more]
    return [[*line, "--dry-run"], [*line, "--overwrite", "--no-progress"]]


def asked(folder: Path, text: str, number: int, thin: int) -> list[list[str]]:
    """Every ``thin``-th recipe with the text, planned or made in turn, and the text by ``--var`` and as a recipe's name."""
    found = []
    for i, content in list(enumerate(recipes(text)))[number % thin :: thin]:
        found.append(_commands(folder, f"carrier-{i}.yaml", content)[(number + i) % 2])
    variable = f'{MODELS}variables: {{t: b}}\nmerge: a + 2 * (t - c)\noutput: "by-{{t}}.safetensors"\n'
    given = f"{text}=1" if number % 4 == 0 else f"t={text}"
    found.append(_commands(folder, "variable.yaml", variable, "--var", given)[number % 2])
    if not text.startswith("-"):
        found.append(["merge", f"{text}.yaml", "--dry-run"])
    return found


def of_yaml(folder: Path) -> list[list[str]]:
    """Every text of YAML, planned or made in turn."""
    return [_commands(folder, f"yaml-{i}.yaml", content)[i % 2] for i, content in enumerate(texts_of_yaml())]


def sound(folder: Path) -> list[list[str]]:
    """Three recipes that are made and two that are refused, after which everything that recipes need is imported."""
    contents = [
        f"{MODELS}{MERGE}verify: {{pictures: false}}\n",
        f"{MODELS}variables: {{m: 0.5}}\nsweep: {{t: [b, c]}}\nmerge: a + m * (t - a)\nset: {{layers: 'linear(0.2, 1)'}}\n",
        f"{MODELS}diff: {{base: a, variant: b}}\n",
        f"{MODELS}merge: [\n",
        f"{MODELS}merge: a - nothing\nquant: 5\n",
    ]
    return [line for i, content in enumerate(contents) for line in _commands(folder, f"sound-{i}.yaml", content)]
