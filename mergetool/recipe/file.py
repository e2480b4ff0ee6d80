"""A recipe file, from bytes to outputs with variables put in, before any model is opened.

    recipe = load(Path("bridge.yaml"), ["m=20"])
    for output in recipe.outputs:
        print(output.label, output.file)

Reading the file is all that is done: nothing in it is evaluated, and no other file, environment variable or address is looked at.
"""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.names import quoted, why_not_plain
from mergetool.checkpoint.outputs import named
from mergetool.errors import UsageError
from mergetool.options import kinds
from mergetool.options.differences import DiffOptions
from mergetool.options.merging import MergeOptions
from mergetool.options.multipliers import Setting, parse_setting
from mergetool.options.running import ShardOptions
from mergetool.options.table import Table, first_named, rows_in
from mergetool.options.verifying import LookOptions
from mergetool.recipe import document, variables
from mergetool.recipe.argument import is_meant
from mergetool.recipe.document import MAX_BYTES, Node, Place
from mergetool.recipe.expression import Expression
from mergetool.recipe.names import Replaced, Variable, expression_of, names_in, replaced, with_variables
from mergetool.recipe.schema import Heading, LoraOutput, MergeOutput, OneLora, OneMerge, PicturesSpec
from mergetool.recipe.validation import as_keys, keys_of, nearest, validated
from mergetool.recipe.variables import Variables

MAX_OUTPUTS = 256

T = TypeVar("T", bound=Table)

_HEADING = tuple(keys_of(Heading))
_FILE = ".safetensors"


@dataclass(frozen=True, slots=True)
class RecipeOutput:
    """One file to make, with its variables put in.

    ``name`` is its key, ``values`` are those of the swept variables it depends on, ``file`` its name in the output folder, where it is one
    file or with ``is_folder`` a folder. ``spec`` says
    what it is; of a merge ``expression`` is the graph over the names in the recipe. ``uses`` maps these names, and the other models that
    the output names, to what they stand for: an earlier output, or a MODEL argument; ``computed`` are models that are expressions over them.
    ``node`` and ``written`` lead to places in the file.
    """

    name: str
    values: Mapping[str, Variable]
    file: str
    spec: MergeOutput | LoraOutput
    uses: Mapping[str, RecipeOutput | RecipeModel]
    node: Node
    expression: Expression | None = None
    written: Replaced | None = None
    computed: tuple[str, ...] = ()
    is_folder: bool = False

    @property
    def label(self) -> str:
        """The name, with the values of a sweep: ``bridge (m=20)``."""
        values = ", ".join(f"{name}={value.text}" for name, value in self.values.items())
        return f"{self.name} ({values})" if values else self.name

    @property
    def earlier(self) -> tuple[RecipeOutput, ...]:
        """The outputs that have to be there first."""
        return tuple(used for used in self.uses.values() if isinstance(used, RecipeOutput))

    def place_of(self, *path: str) -> Place:
        """The place of the value under these keys, or the nearest one around it."""
        return self.node_of(*path).at

    def node_of(self, *path: str) -> Node:
        """The value under these keys, or the nearest one around it."""
        node = self.node
        for key in path:
            inner = node.value.get(key) if isinstance(node.value, dict) else None
            if inner is None:
                break
            node = inner
        return node


@dataclass(frozen=True, slots=True)
class RecipeModel:
    """The meaning of a name under ``models``, or an embedded model, with its place."""

    name: str
    meaning: str
    at: Place


@dataclass(frozen=True)
class RecipeFile:
    """A recipe file as read: its models and its outputs, each output after those that it uses."""

    path: Path
    models: Mapping[str, RecipeModel]
    outputs: tuple[RecipeOutput, ...]

    @property
    def folder(self) -> Path:
        """The folder where relative paths of models begin."""
        return self.path.parent


def load(path: Path, settings: Sequence[str] = ()) -> RecipeFile:
    """The recipe at ``path``, with variables set as ``NAME=VALUE`` texts say.

    Raises InputMissing where there is no file, RecipeError with line and column for all that is wrong in it, UsageError for a setting
    of a variable that the recipe does not have.
    """
    with InputFile.open(path) as file:
        raw = file.read(0, min(file.size, MAX_BYTES + 1))
    return read(raw, path, settings)


def read(raw: bytes, path: Path, settings: Sequence[str] = ()) -> RecipeFile:
    """`load` for the bytes of a file; opens none. Raises what `load` raises but InputMissing."""
    root = document.parse(raw, str(path))
    return _Reader(root, path, dict(map(variables.from_option, settings))).recipe()


def options_of(table: type[T], output: RecipeOutput, names: Mapping[str, str]) -> T:
    """The options of an output that belong to ``table``. ``names`` maps its names to MODEL arguments.

    Raises RecipeError, at the key that is wrong.
    """
    if isinstance(output.spec, MergeOutput):
        return _options_of(table, output.spec, output, names)
    return _options_of(table, output.spec.diff, output, names, "diff")


def look_of(output: RecipeOutput, names: Mapping[str, str]) -> LookOptions | None:
    """The look that a merge asks for when it is made, or None.

    Paths are as they are written. Raises RecipeError, as `options_of`.
    """
    asked = output.spec.verify if isinstance(output.spec, MergeOutput) else False
    if isinstance(asked, PicturesSpec):
        return _options_of(LookOptions, asked, output, names, "verify")
    return LookOptions(images=asked == "pictures") if asked else None


def _options_of(table: type[T], spec: BaseModel, output: RecipeOutput, names: Mapping[str, str], *path: str) -> T:
    given = {}
    for name, row in rows_in(table, "recipe").items():
        value = getattr(spec, name)
        if name not in spec.model_fields_set or value is None:
            continue
        if isinstance(row.option.kind, kinds.Settings):
            value = tuple(_multiplier(output, row.key, group, number) for group, number in value.items())
        elif isinstance(row.option.kind, kinds.Patterns) and isinstance(value, str):
            value = (value,)
        given[name] = names[value] if isinstance(row.option.kind, kinds.ModelName) else value
    try:
        return table(**given)
    except UsageError as error:
        blamed = first_named(str(error), rows_in(table, "recipe"))
        place = output.place_of(*path, *(() if blamed is None else (blamed.key,)))
        raise place.error(as_keys(str(error))) from None


def _multiplier(output: RecipeOutput, key: str, group: str, value: int | Decimal | str) -> Setting:
    try:
        return parse_setting(f"{group}={value}")
    except UsageError as error:
        raise output.place_of(key, group).error(as_keys(str(error))) from None


@dataclass
class _Reader:
    root: Node
    path: Path
    set_: Mapping[str, Variable]
    models: dict[str, RecipeModel] = field(default_factory=dict)
    made: dict[str, list[RecipeOutput]] = field(default_factory=dict)
    depends: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def recipe(self) -> RecipeFile:
        several = "outputs" in self._keys
        validated(Heading, self._part(self.root, inside=True))
        self.models = {name: RecipeModel(name, str(n.value), n.at) for name, n in self._heading("models").items()}
        self.variables = self._variables()
        nodes = self._several() if several else self._single()
        self._check_names(nodes)
        for name, node in nodes.items():
            self.depends[name] = self._depends(name, node)
            self.made[name] = list(self._instances(name, node, later=list(nodes)[len(self.made) :]))
        outputs = tuple(output for made in self.made.values() for output in made)
        self._check_files(outputs)
        return RecipeFile(self.path, self.models, outputs)

    @property
    def _keys(self) -> dict[str, Node]:
        assert isinstance(self.root.value, dict)
        return self.root.value

    def _part(self, node: Node, *, inside: bool) -> Node:
        """The heading's keys of the root, or the others."""
        kept = {key: value for key, value in self._keys.items() if (key in _HEADING) == inside}
        return replace(node, value=kept)

    def _heading(self, key: str) -> dict[str, Node]:
        node = self._keys.get(key)
        return node.value if node is not None and isinstance(node.value, dict) else {}

    # --- outputs as they stand in the file -----------------------------------------------------------------------

    def _several(self) -> dict[str, Node]:
        for key in self._keys:
            if key not in (*_HEADING, "outputs"):
                at = self.root.keys[key]
                if key in (*keys_of(OneMerge), *keys_of(OneLora)):
                    raise at.error(f"{quoted(key)} belongs to an output; move it into one of those under outputs.")
                raise at.error(f"there is no key {quoted(key)} here{nearest(key, (*_HEADING, 'outputs'))}")
        node = self._keys["outputs"]
        if not isinstance(node.value, dict) or not node.value:
            raise node.at.error('"outputs" has to be a mapping of names to outputs, at least one.')
        return node.value

    def _single(self) -> dict[str, Node]:
        return {self.path.stem: self._part(self.root, inside=False)}

    def _check_names(self, nodes: Mapping[str, Node]) -> None:
        for name, model in self.models.items():
            if name.startswith("lab."):
                raise self._at("models", name).error(
                    f"{quoted(name)} is taken: lab. begins the embedded models' names."
                )
            if not model.meaning.isprintable() or not model.meaning.strip():
                raise model.at.error(f"{quoted(name)} has no path, address or name of a model.")
        if "outputs" in self._keys:
            for name in nodes:
                at = self._keys["outputs"].keys[name]
                reason = why_not_plain(name, "")
                if reason or name.startswith((".", "lab.")) or name in self.models or name in self.variables.names:
                    taken = reason or ("it is taken" if not name.startswith(".") else "it begins with a dot")
                    raise at.error(f"an output cannot be named {quoted(name)}, because {taken}; give it another name.")
        for section in ("variables", "sweep"):
            for name in self._heading(section):
                if name in self.models or keyword.iskeyword(name) or name == "lora":
                    raise self._at(section, name).error(
                        f"a variable cannot be named {quoted(name)}, which means something else in an expression."
                    )

    def _at(self, section: str, key: str) -> Place:
        return self._keys[section].keys[key]

    def _variables(self) -> Variables:
        single = {name: variables.variable(node) for name, node in self._heading("variables").items()}
        swept = {}
        for name, node in self._heading("sweep").items():
            if name in single:
                raise self._at("sweep", name).error(
                    f"{quoted(name)} is under variables too; leave it out in one place."
                )
            assert isinstance(node.value, list)
            swept[name] = [variables.variable(value) for value in node.value]
            texts = [value.text for value in swept[name]]
            for text, value in zip(texts, node.value, strict=True):
                if texts.count(text) > 1:
                    raise value.at.error(f"the value {text} stands more than once in this sweep; leave one out.")
        for name, given in self.set_.items():
            if name not in {*single, *swept}:
                raise UsageError(
                    f"the variable {quoted(name)} is set, but {self.path} does not have it{nearest(name, {*single, *swept})}"
                )
            swept.pop(name, None)
            single[name] = given
        return Variables(single, swept)

    # --- outputs with their variables put in -----------------------------------------------------------------------

    def _depends(self, name: str, node: Node) -> tuple[str, ...]:
        """The swept variables that an output depends on, by itself or through the outputs it may use."""
        used: set[str] = set()
        named = set(_leaves(node))
        for key, part in self._parts(node):
            if key == "merge" and isinstance(part.value, str):
                named |= (words := {word.name for word in names_in(part.value)})
                used |= words & self.variables.names
            else:
                used |= set(variables.names_in_braces(part)) & self.variables.names
                named |= {found.name for leaf in _leaves(part) if is_meant(leaf) for found in names_in(leaf)}
        for variable in used:
            named |= {value.text for value in self.variables.values(variable)}
        for earlier in named & set(self.depends):
            used |= set(self.depends[earlier])
        return tuple(swept for swept in self.variables.swept if swept in used)

    @staticmethod
    def _parts(node: Node) -> Iterator[tuple[str, Node]]:
        if isinstance(node.value, dict):
            yield from node.value.items()

    def _instances(self, name: str, node: Node, *, later: Sequence[str]) -> Iterator[RecipeOutput]:
        if not isinstance(node.value, dict):
            raise node.at.error(f"{quoted(name)} has to be a mapping with merge or diff in it.")
        kinds = [key for key in ("merge", "diff") if key in node.value]
        if len(kinds) != 1:
            said = "both merge and diff" if kinds else "neither merge nor diff"
            known = {*keys_of(MergeOutput), *keys_of(LoraOutput), *(_HEADING if "outputs" not in self._keys else ())}
            strange = next((key for key in node.value if key not in known), None)
            if strange is not None and not kinds:
                raise node.keys[strange].error(f"there is no key {quoted(strange)} here{nearest(strange, known)}")
            raise node.at.error(f"this output has {said}; it needs one of them.")
        before = sum(map(len, self.made.values()))
        for number, values in enumerate(self.variables.combinations(self.depends[name]), 1):
            if before + number > MAX_OUTPUTS:
                raise node.at.error(f"the recipe makes more than {MAX_OUTPUTS} outputs; sweep over fewer values.")
            yield self._instance(name, node, values, kinds[0], later)

    def _instance(
        self, name: str, node: Node, values: Mapping[str, Variable], kind: str, later: Sequence[str]
    ) -> RecipeOutput:
        known = {**self.variables.single, **values}
        assert isinstance(node.value, dict)
        expression = node.value.get("merge")
        rest = replace(node, value={key: inner for key, inner in node.value.items() if key != "merge"})
        whole = variables.filled(rest, known)
        assert isinstance(whole.value, dict)
        if expression is not None:
            whole = replace(whole, value={"merge": expression, **whole.value})
        beside = () if "outputs" in self._keys else _HEADING
        spec = validated(MergeOutput, whole, beside) if kind == "merge" else validated(LoraOutput, whole, beside)
        # Of an output with other swept values than these there is none to use: it would have made this one depend on them too.
        earlier = {
            output.name: output
            for made in self.made.values()
            for output in made
            if all(values.get(swept) == value for swept, value in output.values.items())
        }
        file, is_folder = self._file(name, whole, values, spec)
        output = RecipeOutput(name, values, file, spec, {}, whole, is_folder=is_folder)
        if isinstance(spec, LoraOutput):
            uses, computed = self._of_diff(output, earlier, later, _models_of_diff(spec))
            return _checked(replace(output, uses=uses, computed=computed))
        assert expression is not None
        written = with_variables(expression, known)
        parsed = expression_of(expression, written, {*self.models, *earlier}, later, known)
        uses = {
            model: self._meaning(model, earlier) or RecipeModel(model, model, expression.at)
            for model in (*parsed.models, *parsed.loras)
        }
        uses |= self._named(output, earlier, _models_of_merge(spec))
        done = replace(output, uses=uses, expression=parsed, written=written)
        return _checked(done)

    def _meaning(self, name: str, earlier: Mapping[str, RecipeOutput]) -> RecipeOutput | RecipeModel | None:
        return earlier.get(name) or self.models.get(name)

    def _of_diff(
        self,
        output: RecipeOutput,
        earlier: Mapping[str, RecipeOutput],
        later: Sequence[str],
        models: Sequence[tuple[tuple[str, ...], str]],
    ) -> tuple[dict[str, RecipeOutput | RecipeModel], tuple[str, ...]]:
        """The names that a difference uses, and those of its models that are expressions."""
        uses: dict[str, RecipeOutput | RecipeModel] = {}
        computed = []
        for path, text in models:
            if self._meaning(text, earlier) is not None or not is_meant(text):
                uses |= self._named(output, earlier, [(path, text)])
                continue
            node = output.node_of(*path)
            parsed = expression_of(node, replaced(text, {}), {*self.models, *earlier}, later, ())
            uses |= {
                name: self._meaning(name, earlier) or RecipeModel(name, name, node.at)
                for name in (*parsed.models, *parsed.loras)
            }
            computed.append(text)
        return uses, tuple(computed)

    def _named(
        self, output: RecipeOutput, earlier: Mapping[str, RecipeOutput], names: Sequence[tuple[tuple[str, ...], str]]
    ) -> dict[str, RecipeOutput | RecipeModel]:
        meanings: dict[str, RecipeOutput | RecipeModel] = {}
        for path, name in names:
            meaning = self._meaning(name, earlier)
            if meaning is None and not name.startswith("lab."):
                raise output.place_of(*path).error(
                    f"{quoted(name)} is no model or earlier output of this recipe{nearest(name, {*self.models, *earlier})}"
                )
            meanings[name] = meaning or RecipeModel(name, name, output.place_of(*path))
        return meanings

    def _file(
        self, name: str, node: Node, values: Mapping[str, Variable], spec: MergeOutput | LoraOutput
    ) -> tuple[str, bool]:
        """The file's name, and whether it is a folder's."""
        shards = isinstance(spec, MergeOutput) and spec.shard_size is not None
        folder = shards or (isinstance(spec, MergeOutput) and spec.layout == "diffusers")
        file = spec.output
        if file is None:
            file = "-".join([name, *(value.text for value in values.values())]) + ("" if folder else _FILE)
        slash, file = file[len(file.rstrip("/")) :], file.rstrip("/")
        inner = node.value.get("output") if isinstance(node.value, dict) else None
        at = inner.at if inner is not None else node.at
        reason = why_not_plain(file, "")
        if reason or file.startswith(".") or "{" in file or "}" in file:
            reason = reason or (
                "it begins with a dot" if file.startswith(".") else "braces stand around a variable only"
            )
            raise at.error(f"an output cannot be called {quoted(file)}, because {reason}; -o says the folder.")
        try:
            target = named(file + slash, folder=folder)
        except UsageError as error:
            raise at.error(str(error)) from None
        if isinstance(spec, LoraOutput) and target.is_folder:
            raise at.error(f"a LoRA is one file: call it {quoted(file + _FILE)}.")
        if shards and not target.is_folder:
            raise at.error(f"{quoted(file)} is one file, but shards need a folder; leave out its ending or shard_size.")
        return target.path.name, target.is_folder

    def _check_files(self, outputs: Sequence[RecipeOutput]) -> None:
        seen: dict[str, RecipeOutput] = {}
        for output in outputs:
            same = unicodedata.normalize("NFC", output.file).casefold()
            if same in seen:
                hint = ", ".join(f"{{{name}}}" for name in output.values) or "another name"
                raise output.place_of("output").error(
                    f"{output.label} and {seen[same].label} would both be written to {quoted(output.file)}; "
                    f"put {hint} into its name."
                )
            seen[same] = output


def _checked(output: RecipeOutput) -> RecipeOutput:
    """``output``; raises RecipeError for options that contradict each other, before any file is looked for."""
    for table in (MergeOptions, ShardOptions) if isinstance(output.spec, MergeOutput) else (DiffOptions,):
        options_of(table, output, {name: name for name in (*output.uses, *output.computed)})
    look_of(output, {name: name for name in output.uses})
    return output


def _models_of_merge(spec: MergeOutput) -> list[tuple[tuple[str, ...], str]]:
    mentions: list[tuple[tuple[str, ...], str | None]] = [(("from",), spec.keep_from)]
    if isinstance(spec.verify, PicturesSpec):
        mentions += [(("verify", "refiner"), spec.verify.refiner), (("verify", "pipeline"), spec.verify.pipeline)]
    return [(path, name) for path, name in mentions if name]


def _models_of_diff(spec: LoraOutput) -> list[tuple[tuple[str, ...], str]]:
    mentions = [(("diff", key), getattr(spec.diff, key)) for key in ("base", "variant", "variant2")]
    return [(path, name) for path, name in mentions if name]


def _leaves(node: Node) -> Iterator[str]:
    if isinstance(node.value, dict | list):
        for inner in node.value.values() if isinstance(node.value, dict) else node.value:
            yield from _leaves(inner)
    elif isinstance(node.value, str):
        yield node.value
