"""What is printed of a verification, and its JSON."""

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
    """What was found."""

    def done(self, plan: VerifyOptions, result: Verification) -> None:
        """Weights, pictures, and where the page is."""
        self.json |= described(result)
        if self.prints:
            print_found(result)
            if plan.page is not None:
                console.heading("report", str(plan.page))


class ReplayReport(CommandEvents):
    """What was found of the bytes alone."""

    def done(self, plan: VerifyOptions, result: Verification) -> None:
        """Whether they are the same."""
        assert result.replay is not None
        self.json |= _replay_json(result.replay)
        if self.prints:
            _print_replay(result.replay, result.seconds)


def described(found: Verification) -> dict[str, Any]:
    """What ``--json`` has of it."""
    from mergetool.verification import pictures

    seen = None if found.pictures is None else pictures.summary(found.pictures)
    whole = {} if found.replay is None else {"replay": _replay_json(found.replay)}
    return _weights_json(found.weights) | whole | {"pictures": seen, "left_out": found.left_out, "passed": found.passed}


def print_found(found: Verification) -> None:
    """What was found, in lines."""
    if found.replay is not None:
        _print_replay(found.replay, found.seconds)
    else:
        _print_weights(found.weights, found.seconds)
    _print_pictures(found.pictures, found.left_out)


def _print_weights(report: WeightsReport, seconds: float) -> None:
    from mergetool.comparison.energies import relative

    if report.derived:
        console.heading("recipe", report.expression)
    for what, names in report.damage():
        console.heading("", f"{len(names)} {what}: {console.listed(names)}")
    for parent, found in report.distances.items():
        console.heading("", f"{100 * relative(found):.3g} % from {parent}, in the norm of all weights")
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
    console.heading("look", f"{asked} of each model, {look.first.steps} steps at guidance {look.first.guidance:g}")
    for second in look.refinements:
        reached = second.levels()
        console.heading(
            "",
            f"then {second.model}: {console.plural(len(reached) - 1, 'evaluation')} from sigma {reached[0]:.3f} "
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
        "distances": {parent: relative(found) for parent, found in report.distances.items()},
    }


def _replay_json(found: Replay) -> dict[str, Any]:
    return {
        "same": found.same,
        "expression": found.expression,
        "reasons": found.reasons,
        "difference": found.difference,
        "missing": found.missing,
        "extra": found.extra,
        "differing": found.differing,
        "bytes": found.size,
        "files": found.files,
        "output": None if found.kept is None else str(found.kept.path),
    }


def _print_replay(found: Replay, seconds: float) -> None:
    _print_bytes(found, seconds)
    if found.kept is not None:
        if found.kept.note:
            console.heading("note", found.kept.note)
        console.heading("done", str(found.kept))


def _print_bytes(found: Replay, seconds: float) -> None:
    console.heading("recipe", found.expression)
    files = console.plural(found.files, "file")
    if found.same:
        console.heading("same", f"every byte of {files}, {console.size(found.size)}  {seconds:.1f} s")
        return
    for reason in found.reasons:
        console.heading("OTHER", reason)
    if found.difference:
        console.heading("OTHER", found.difference)
    named = [f"{name} (from byte {at})" for name, at in found.differing.items()]
    for what, names in (
        ("missing, or of another shape or dtype", found.missing),
        ("not in the recipe", found.extra),
        ("of other bytes", named),
    ):
        if names:
            console.heading("OTHER", f"{console.plural(len(names), 'tensor')} {what}: {console.listed(names)}")
    if found.differing and not found.reasons:
        console.heading("", "the inputs and the version are those recorded: the recipe was edited, or the tensors were")
