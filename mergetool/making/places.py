"""Find a recipe's models and outputs on this disk, and put places in the file into errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mergetool import models
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.outputs import Target
from mergetool.checkpoint.paths import typed
from mergetool.errors import MergetoolError
from mergetool.recipe.document import Node, Place
from mergetool.recipe.file import RecipeFile, RecipeModel, RecipeOutput
from mergetool.recipe.names import names_in, replaced
from mergetool.recipe.quotes import one_line, quote
from mergetool.recipe.validation import as_keys


@dataclass(frozen=True)
class Places:
    """A recipe with the folder for its outputs, or its only one's ``file``.

    The file may be a folder too.
    """

    recipe: RecipeFile
    folder: Path
    file: Target | None = None

    def path(self, output: RecipeOutput) -> Path:
        """The path of an output."""
        return self.target(output).path

    def target(self, output: RecipeOutput) -> Target:
        """The target of an output."""
        if self.file is not None:
            return self.file
        return Target(self.folder / output.file, "folder" if output.is_folder else "file")

    def model(self, used: RecipeOutput | RecipeModel) -> str:
        """The MODEL argument for a name.

        A relative path counts from the recipe's folder, unless it is a registered name.
        """
        if isinstance(used, RecipeOutput):
            return str(self.path(used))
        meaning = used.meaning
        if meaning.startswith("lab.") or "://" in meaning or meaning in {entry.name for entry in models.listing()}:
            return meaning
        place = self.recipe.folder / meaning
        if not place.exists():
            place = self.recipe.folder / typed(meaning)
        # A word that is no file either: the error about registered names says more than the one about a path.
        return meaning if not (place.exists() or "/" in meaning or "." in meaning) else str(place)

    def names(self, output: RecipeOutput) -> dict[str, str]:
        """The MODEL arguments for all names that an output uses, those in its expressions included."""
        names = {name: self.model(used) for name, used in output.uses.items()}
        return names | {text: self._written(text, names) for text in output.computed}

    def expression(self, output: RecipeOutput) -> str:
        """Write a merge's expression as `mergetool merge` takes it, with MODEL arguments for names."""
        assert output.written is not None
        return self._written(output.written.text, self.names(output))

    @staticmethod
    def _written(text: str, names: Mapping[str, str]) -> str:
        by = {name: quote(names[name.name]) for name in names_in(text) if name.name in names}
        return one_line(replaced(text, by).text).strip()

    @contextmanager
    def located(self, *outputs: RecipeOutput) -> Iterator[None]:
        """Put the place in the recipe in front of an error.

        It is the place of the model or pattern at fault, else of the output.
        """
        try:
            yield
        except MergetoolError as error:
            sentence = str(error)
            if sentence.startswith(f"{self.recipe.path}:"):
                raise
            # Of what it has in quotes, the first is what is wrong; a name that is near comes later.
            named = [(sentence.find(text), place) for output in outputs for text, place in self._named(output)]
            place = min(
                (mention for mention in named if mention[0] >= 0), key=lambda mention: mention[0], default=(0, None)
            )[1]
            whole = outputs[0].place_of("diff" if outputs[0].expression is None else "merge")
            raise type(error)(f"{place or whole}: {as_keys(sentence)}") from None

    def _named(self, output: RecipeOutput) -> Iterator[tuple[str, Place]]:
        """The names that an error may have in quotes, and their places in the recipe."""
        for used in output.uses.values():
            if isinstance(used, RecipeModel):
                yield quoted(self.model(used)), used.at
        yield from _texts(output.node)


def _texts(node: Node) -> Iterator[tuple[str, Place]]:
    """The keys and texts below a node, in quotes, but for an expression."""
    if isinstance(node.value, dict):
        for key, inner in node.value.items():
            if key != "merge":
                yield quoted(key), node.keys[key]
                yield from _texts(inner)
    elif isinstance(node.value, list):
        for inner in node.value:
            yield from _texts(inner)
    elif isinstance(node.value, str):
        yield quoted(node.value), node.at
