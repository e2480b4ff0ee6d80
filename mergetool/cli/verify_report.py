"""The report of a verification, and its JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergetool.cli import console
from mergetool.cli.report import CommandEvents

if TYPE_CHECKING:
    from mergetool.options.verifying import VerifyOptions
    from mergetool.verification.checks import Verification
    from mergetool.verification.pictures import PicturesReport
    from mergetool.verification.replay import Replay
    from mergetool.verification.weights import WeightsReport


class VerifyReport(CommandEvents):
    """Prints a verification."""

    def done(self, plan: VerifyOptions, result: Verification) -> None:
        """Weights, pictures, and where the page is."""
        self.json |= described(result)
        if self.prints:
            print_verification(result)
            if plan.page is not None:
                console.heading("report", str(plan.page))


class ReplayReport(CommandEvents):
    """Prints how the bytes of a replay compare."""

    def done(self, plan: VerifyOptions, result: Verification) -> None:
        """Whether they are the same."""
        assert result.replay is not None
        self.json |= _replay_json(result.replay)
        if self.prints:
            _print_replay(result.replay, result.seconds)


def described(verification: Verification) -> dict[str, Any]:
    """A verification as ``--json`` prints it."""
    from mergetool.verification import pictures

    seen = None if verification.pictures is None else pictures.summary(verification.pictures)
    whole = {} if verification.replay is None else {"replay": _replay_json(verification.replay)}
    return (
        _weights_json(verification.weights)
        | whole
        | {"pictures": seen, "left_out": verification.left_out, "passed": verification.passed}
    )


def print_verification(verification: Verification) -> None:
    """Print a verification, in lines."""
    if verification.replay is not None:
        _print_replay(verification.replay, verification.seconds)
    else:
        _print_weights(verification.weights, verification.seconds)
    _print_pictures(verification.pictures, verification.left_out)


def _print_weights(report: WeightsReport, seconds: float) -> None:
    from mergetool.comparison.energies import relative

    if report.derived:
        console.heading("recipe", report.expression)
    for damage, names in report.damage():
        console.heading("", f"{len(names)} {damage}: {console.listed(names)}")
    for parent, distance in report.distances.items():
        console.heading("", f"{100 * relative(distance):.3g} % from {parent}, in the norm of all weights")
    if not report.derived:
        looked = f"{console.plural(report.kept, 'tensor')} looked through for NaN and infinity"
        console.heading("weights", f"no recipe, not derived; {looked}  {seconds:.1f} s")
        return
    compared = (
        f"{report.merged} merged and {report.kept} kept tensors, {console.size(report.bytes_compared)} derived again"
    )
    console.heading("sound" if report.sound else "UNSOUND", f"{compared}  {seconds:.1f} s")


def _print_pictures(looked: PicturesReport | None, left_out: str) -> None:
    if looked is None:
        console.heading("look", f"no pictures: {left_out}")
        return
    look = looked.look
    asked = console.plural(len(look.shots), "picture")
    console.heading("look", f"{asked} of each model, {look.first.steps} steps at {look.first.guided}")
    for second in look.refinements:
        console.heading(
            "",
            f"then {second.model}: {console.plural(second.evaluations, 'evaluation')}{second.begins} "
            f"(strength {second.strength:g}, {second.strength_as})",
        )
    for note in look.notes:
        console.heading("note", note)
    adherence = any(column.adherence is not None for column in looked.columns)
    console.table(
        ["pictures of", *(["adherence"] if adherence else []), "noise", "collapsed"],
        [
            [
                column.label,
                *([f"{100 * (column.adherence or 0):.0f} %"] if adherence else []),
                str(sum(m.noise for m in column.measures)),
                str(sum(m.collapsed for m in column.measures)),
            ]
            for column in looked.columns
        ],
    )
    for verdict in looked.verdicts:
        said = "not judged: " if verdict.passed is None else ""
        console.heading(
            {None: "?", True: "ok", False: "NO"}[verdict.passed], f"{verdict.name}: {said}{verdict.sentence}"
        )


def _weights_json(report: WeightsReport) -> dict[str, Any]:
    from mergetool.comparison.energies import relative

    return {
        "derived": report.derived,
        "sound": report.sound,
        "expression": report.expression,
        "merged": report.merged,
        "kept": report.kept,
        "bytes_compared": report.bytes_compared,
        "changed": report.changed,
        "missing": report.missing,
        "extra": report.extra,
        "differing": report.differing,
        "non_finite": report.non_finite,
        "distances": {parent: relative(distance) for parent, distance in report.distances.items()},
    }


def _replay_json(replay: Replay) -> dict[str, Any]:
    return {
        "same": replay.same,
        "expression": replay.expression,
        "reasons": replay.reasons,
        "difference": replay.difference,
        "missing": replay.missing,
        "extra": replay.extra,
        "differing": replay.differing,
        "bytes": replay.size,
        "files": replay.files,
        "output": None if replay.kept is None else str(replay.kept.path),
    }


def _print_replay(replay: Replay, seconds: float) -> None:
    _print_bytes(replay, seconds)
    if replay.kept is not None:
        if replay.kept.note:
            console.heading("note", replay.kept.note)
        console.heading("done", str(replay.kept))


def _print_bytes(replay: Replay, seconds: float) -> None:
    console.heading("recipe", replay.expression)
    files = console.plural(replay.files, "file")
    if replay.same:
        console.heading("same", f"every byte of {files}, {console.size(replay.size)}  {seconds:.1f} s")
        return
    for reason in replay.reasons:
        console.heading("OTHER", reason)
    if replay.difference:
        console.heading("OTHER", replay.difference)
    named = [f"{name} (from byte {at})" for name, at in replay.differing.items()]
    for difference, names in (
        ("missing, or of another shape or dtype", replay.missing),
        ("not in the recipe", replay.extra),
        ("of other bytes", named),
    ):
        if names:
            console.heading("OTHER", f"{console.plural(len(names), 'tensor')} {difference}: {console.listed(names)}")
    if replay.differing and not replay.reasons:
        console.heading("", "the inputs and the version are those recorded: the recipe was edited, or the tensors were")
