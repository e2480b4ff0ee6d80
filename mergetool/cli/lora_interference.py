"""``mergetool lora interference``: how much LoRAs get in each other's way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergetool.api.lora_checks import LoraInterference, run_lora_interference
from mergetool.cli import console
from mergetool.cli.diff_ranks import GROUPS, in_group
from mergetool.cli.parameters import Typed, command
from mergetool.cli.report import CommandEvents

if TYPE_CHECKING:
    from mergetool.api.lora_checks import PairScores
    from mergetool.lora.operations import Score

EXAMPLES = """\b
Examples:
  mergetool lora interference style.safetensors detail.safetensors
  mergetool lora interference style.safetensors detail.safetensors other.safetensors --json
  mergetool lora interference style.safetensors detail.safetensors --signs -v
  mergetool lora interference tuned-a.safetensors tuned-b.safetensors --base z-image

cosine is 1 where both do the same, -1 where they cancel, 0 where neither helps or hinders the other. outputs is the share of A's energy that \
writes to directions that B writes to, inputs the share that reads directions that B reads, both the share that does both; LoRAs that have \
nothing to do with each other score about rank / width. --signs adds the share of elements with opposite signs (0.5 for such LoRAs), which \
takes longer.
"""


@command(LoraInterference)
def interference(typed: Typed) -> None:
    """Score how much LoRAs act on the same weights.

    The scores are by group and overall; with --base also of checkpoints' differences to it.
    """
    with _Scores.shown(typed) as report:
        run_lora_interference(typed.request(LoraInterference), report)


class _Scores(CommandEvents):
    """One pair after the other."""

    def done(self, plan: LoraInterference, result: PairScores) -> None:
        """The scores of a pair."""
        groups, overall = _summary(result.scores)
        self.json.setdefault("pairs", []).append(_pair_json(result, groups, overall))
        if not self.prints:
            return
        shared = sum(all(score.energies) for score in result.scores)
        console.heading(
            "pair",
            f"A = {result.first}, B = {result.second}: {len(result.scores)} modules, {shared} of them in both",
        )
        for warning in result.warnings:
            console.heading("note", warning)
        names = [name for name, _ in result.left_out]
        if names:
            console.heading("", f"{len(names)} left out, no matrices of a module: {console.listed(names, most=2)}")
        _table([*(result.scores if self.typed.verbose else []), *groups, overall], signs=plan.signs)


def _summary(scores: Sequence[Score]) -> tuple[list[Score], Score]:
    """The scores of every group that has matrices, and of all."""
    from mergetool.lora.operations import summed

    groups = [
        summed(chosen, group)
        for group in (*GROUPS, "other")
        if (chosen := [score for score in scores if in_group(score.groups) == group])
    ]
    return groups, summed(scores, "overall")


def _table(scores: Sequence[Score], *, signs: bool) -> None:
    header = ["", "norm A", "norm B", "cosine", "outputs", "inputs", "both", *(["opposing"] if signs else [])]
    rows = [
        [
            score.name,
            *(f"{energy**0.5:.4g}" for energy in score.energies),
            f"{score.cosine:+.4f}",
            *(f"{100 * share:.1f} %" for share in (score.column_share, score.row_share, score.both_share)),
            *([f"{score.opposing:.3f}" if score.opposing is not None else ""] if signs else []),
        ]
        for score in scores
    ]
    console.table(header, rows)


def _pair_json(result: PairScores, groups: Sequence[Score], overall: Score) -> dict[str, Any]:
    return {
        "first": result.first,
        "second": result.second,
        "overall": _json(overall),
        "groups": [_json(score) for score in groups],
        "modules": [_json(score) for score in result.scores],
        "left_out": [{"name": name, "reason": reason} for name, reason in result.left_out],
    }


def _json(score: Score) -> dict[str, Any]:
    return {
        "name": score.name,
        "norms": [energy**0.5 for energy in score.energies],
        "cosine": score.cosine,
        "column_share": score.column_share,
        "row_share": score.row_share,
        "both_share": score.both_share,
        "opposing": score.opposing,
    }
