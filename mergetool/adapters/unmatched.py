"""Check that a LoRA file fits a model: list keys without a part, and refuse too many."""

from __future__ import annotations

from mergetool.adapters.lora_file import LoraFile
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError

LARGE_SHARE = 0.1
"""The share of a file's keys from which on it is a warning that they change nothing."""


def require_match(file: LoraFile, model: str, *, skip_unmatched: bool) -> None:
    """Raise DataError for a LoRA that does not fit ``model``, or fits only in part.

    ``model`` is a name. A file that fits in part is accepted if its other keys are to be skipped. Keys of text
    encoders are for another model and are no error.
    """
    if not file.changes:
        raise DataError(_nothing(file, model))
    if file.unmatched and not skip_unmatched:
        key, reason = file.unmatched[0]
        raise DataError(
            f'"{file.name}": {quoted(key)} changes nothing in {model} ({reason}; {len(file.unmatched)} such keys in all); '
            "it may be for another model: `skip_unmatched` leaves them out."
        )


def left_aside(file: LoraFile) -> tuple[tuple[str, str], ...]:
    """Every key that changes nothing, with the reason: those of text encoders too."""
    return (*file.unmatched, *((key, "of a text encoder") for key in file.text_encoder))


def remarks(file: LoraFile) -> tuple[str, ...]:
    """Warn of a file whose keys change nothing, where it is used all the same."""
    found = []
    count, total = len(file.unmatched), len(file.checkpoint.tensors) - len(file.text_encoder)
    if count >= LARGE_SHARE * total and count:
        found.append(
            f"{count} of {total} keys of {file.name} ({100 * count / total:.0f} %) change nothing: {file.unmatched[0][1]}"
        )
    if file.text_encoder:
        found.append(
            f"{len(file.text_encoder)} keys of {file.name} are for a text encoder and are left aside: {file.text_encoder[0]}"
        )
    whole = [adapter for adapter in file.adapters if adapter.kind == "whole"]
    if whole:
        found.append(
            f"{len(whole)} weights of {file.name} take the place of the model's, whatever its strength: {whole[0].module}"
        )
    for part, width in file.widens.items():
        found.append(f"{file.name} wants {width} columns of {part}: the model's are followed by zeros")
    return tuple(found)


def _nothing(file: LoraFile, model: str) -> str:
    if file.unread:
        kinds = " and ".join(f"{kind} ({count})" for kind, count in file.unread.items())
        return (
            f'"{file.name}" adds nothing to {model}: its modules are {kinds}, which is not read; apply it in the program that it is '
            "for, and save that model."
        )
    if not file.unmatched:
        return (
            f'"{file.name}" adds nothing to {model}: all of its {len(file.text_encoder)} keys are for a text encoder; give a '
            "LoRA that changes the diffusion model."
        )
    key = file.unmatched[0][0]
    return (
        f'"{file.name}" adds nothing to {model}: none of its {len(file.unmatched)} keys, {quoted(key)} for one, is of a part that '
        "the model has; give a LoRA for this model, or this model in the layout that the LoRA is for."
    )
