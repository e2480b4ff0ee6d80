"""What two models differ by, as a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from mergetool.api.events import Progress, StrPath
from mergetool.api.progress import counting, patterns

if TYPE_CHECKING:
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
    budget: int | str | None = None,
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
    from mergetool.options.differences import DiffOptions

    options = DiffOptions(
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
