"""The files of a difference: the LoRA, and those beside it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from mergetool.adapters import output
from mergetool.checkpoint.outputs import Target, lora_target
from mergetool.difference.pairs import Pairing
from mergetool.errors import UsageError
from mergetool.options.differences import DiffOptions
from mergetool.recipe.quotes import with_loras


@dataclass(frozen=True, slots=True)
class DiffFiles:
    """The files of one difference; None for those that are not asked for."""

    lora: Target
    spectra: Target | None
    full: Target | None
    checkpoint: Target | None

    @classmethod
    def checked(cls, lora: Path | Target, options: DiffOptions, pairing: Pairing, *, overwrite: bool) -> DiffFiles:
        """Check that all files can be written, before any work. Headers are known only when all ranks are.

        A file of directions that is there is added to. Raises UsageError for two of one name, and what `output.check` raises.
        """
        inputs = [file for model in pairing.inputs for file in model.checkpoint.files]
        files = cls.named(lora, options)
        output.check(files.lora, inputs, overwrite=overwrite)
        taken = [files.lora.path.absolute()]
        for name, target in (("spectra", files.spectra), ("full", files.full), ("checkpoint", files.checkpoint)):
            if target is None:
                continue
            output.check(target, inputs, overwrite=overwrite or name == "spectra")
            if target.path.absolute() in taken:
                raise UsageError(f"`{name}` names the same file as another output; give one of them another name.")
            taken.append(target.path.absolute())
        if options.spectra is not None and pairing.second is not None:
            raise UsageError(
                "`spectra` keeps the directions of one difference, and `variant2` makes two; leave one of them out."
            )
        return files

    @classmethod
    def named(cls, lora: Path | Target, options: DiffOptions) -> DiffFiles:
        """The files by their names alone. Raises what `outputs.lora_target` raises."""
        beside = {name: lora_target(place, role=f"`{name}`") for name, place in options.beside.items()}
        return cls(lora_target(lora), beside.get("spectra"), beside.get("full"), beside.get("checkpoint"))

    def baked(self, base: str, *, has_full: bool) -> str:
        """The expression of the checkpoint: ``base`` with the stored factors added."""
        stored = [self.lora, self.full] if has_full and self.full is not None else [self.lora]
        return with_loras(base, [(str(one.path.absolute()), Fraction(1)) for one in stored])
