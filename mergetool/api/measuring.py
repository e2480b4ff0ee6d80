"""What two models differ by: as a LoRA, and as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from mergetool.api.events import Progress, StrPath
from mergetool.api.progress import counting, patterns

if TYPE_CHECKING:
    from mergetool.comparison.comparison import Report
    from mergetool.lora.extract import Extraction


def diff(
    base: str,
    variant: str,
    output: StrPath,
    *,
    rank: int = 0,
    rank_thresh: float | None = None,
    rank_max: int | None = None,
    rule: Literal["energy", "fro", "sum", "ratio", "abs", "knee"] = "energy",
    budget: int = 0,
    min_dim: int = 32,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    skip_unmatched: bool = False,
    overwrite: bool = False,
    progress: Progress = False,
) -> Extraction:
    """Take the difference ``variant - base`` as a LoRA, written to ``output``; the variant may be a LoRA itself.

    MergeOptions are those of the command; ``budget`` is in bytes. Where nothing is said ``rank_thresh`` is 0.95, of the rules that take a share, and
    ``rank_max`` 64, but 0 with a budget. Returns the rank, energy and residual of every
    matrix, and what was left out. Raises MergetoolError.
    """
    from mergetool.checkpoint.outputs import lora_target
    from mergetool.lora import on_device
    from mergetool.lora.extract import extract, open_diff
    from mergetool.lora.pairs import chosen

    options = chosen(
        rank=rank,
        rank_thresh=rank_thresh,
        rank_max=rank_max,
        rule=rule,
        budget=budget,
        min_dim=min_dim,
        include=patterns(include),
        exclude=patterns(exclude),
        dtype=dtype,
        seed=seed,
    )
    with (
        open_diff(base, variant, options, skip_unmatched=skip_unmatched) as pairing,
        counting("diff", pairing.bytes_to_read(options), progress) as advance,
    ):
        return extract(
            pairing,
            lora_target(output),
            options,
            overwrite=overwrite,
            threads=threads,
            device=on_device.choose(device),
            progress=advance,
        )


def compare(
    base: str,
    variant: str,
    *,
    reference: str | None = None,
    reference_base: str | None = None,
    onto: str | None = None,
    multiplier: float | str = 1,
    target: float = 0.01,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    threads: int | None = None,
    progress: Progress = False,
) -> Report:
    """Measure how far ``variant`` lies from ``base``, part by part, in one pass, and advise a multiplier for their difference.

    ``reference`` - ``reference_base`` (``base`` without it) is a difference whose size is known to be right, ``target`` the wanted change as a
    share; ``onto`` is what the difference will be added to (``base`` without it). ``multiplier`` is a number, exact as text, or
    "recommended": that of the merge whose rounding is looked at.
    """
    from mergetool.comparison import comparison
    from mergetool.options.merging import MergeOptions

    size = comparison.multiplier_of(str(multiplier))
    options = MergeOptions(include=patterns(include), exclude=patterns(exclude), dtype=dtype)
    with (
        comparison.open_comparison(
            base, variant, reference=reference, reference_base=reference_base, onto=onto, options=options
        ) as opened,
        counting("compare", opened.bytes_read, progress) as advance,
    ):
        return comparison.compare(opened, multiplier=size, target=target, threads=threads, progress=advance)
