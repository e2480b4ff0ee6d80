"""The tables of docs/explanation/lab.md and its first paragraph, computed from kept readings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.claims import drawings
from training.claims.bench import Bench, Readings
from training.claims.drawings import CARRIERS, DELTAS, LABELS, PARENTS, Drawing, Mix, scenes
from training.claims.intervals import Curve, Decision, Interval, best_of, decide, difference, interval
from training.claims.verdicts import Looked, refusals
from training.recipes import SHIPPED
from training.world import SIZES

Line = Sequence[str]


class Unread(LookupError):
    """A table asks for a drawing that has not been read."""


def percent(of: Interval) -> str:
    return f"{100 * of.mean:.1f} % [{100 * of.low:.0f}, {100 * of.high:.0f}]"


def points(of: Interval) -> str:
    """A difference, in percentage points."""
    return f"{100 * of.mean:+.1f} [{100 * of.low:+.0f}, {100 * of.high:+.0f}]"


def share(values: ArrayLike) -> str:
    return percent(interval(values))


def table(head: Line, rows: Sequence[Line]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows))


class Tables:
    """Everything that is computed from a bench's readings. Methods raise Unread for what is not there yet."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def drawings(self, name: str) -> list[Drawing]:
        """What a table needs; that of two depends on what others found."""
        if name == "both":
            best = self.best()
            return [row for carrier in CARRIERS for row in drawings.both_curve(carrier, best[carrier]).values()]
        return drawings.verify(*self.alkahest()) if name == "verify" else drawings.PLAIN[name]

    def text(self, name: str) -> str:
        """A table, or the paragraph "claims", in Markdown."""
        made: str = getattr(self, name.replace("-", "_"))()
        return made

    # ---- readings

    def read(self, drawing: Drawing) -> Readings:
        kept = self.bench.readings(drawing)
        if kept is None:
            raise Unread(drawing.name)
        return kept

    def right(self, drawing: Drawing, *characters: str) -> NDArray[np.bool_]:
        """For each picture whether it shows its prompt and has the characters."""
        kept = self.read(drawing)
        right: NDArray[np.bool_] = np.logical_and.reduce([kept["adherent"], *(kept[name] for name in characters)])
        return right

    def kinds(self, drawing: Drawing) -> dict[str, NDArray[np.bool_]]:
        """Which pictures are of one figure, of two, of held-out pairs."""
        wanted = scenes(drawing.prompts, self.bench.count, drawing.size)
        single = np.array([scene.relation is None for scene in wanted])
        held = np.array([scene.held_out for scene in wanted])
        return {"one": single, "two": ~single & ~held, "held out": held}

    def by_kind(self, drawing: Drawing) -> list[str]:
        right = self.right(drawing)
        return [share(right[kind]) for kind in self.kinds(drawing).values()]

    def curves(self, made: Callable[[str], Mapping[float, Drawing]], *characters: str) -> dict[str, Curve]:
        return {
            carrier: {scale: self.right(drawing, *characters) for scale, drawing in made(carrier).items()}
            for carrier in CARRIERS
        }

    # ---- decisions

    def alone(self, character: str) -> dict[str, Curve]:
        return self.curves(lambda carrier: drawings.curve(carrier, DELTAS[character]), character)

    def together(self) -> dict[str, Curve]:
        best = self.best()
        return self.curves(lambda carrier: drawings.both_curve(carrier, best[carrier]), *DELTAS)

    def best(self) -> dict[str, dict[str, float]]:
        """By carrier and character the multiplier of the delta alone that is best in the half that chooses."""
        curves = {character: self.alone(character) for character in DELTAS}
        return {carrier: {name: best_of(curves[name][carrier]) for name in DELTAS} for carrier in CARRIERS}

    def alkahest(self) -> tuple[dict[str, float], float]:
        """Alkahest's best multipliers, and the best share of them for both deltas at once."""
        return self.best()["alkahest"], best_of(self.together()["alkahest"])

    def decisions(self) -> dict[str, tuple[Decision, Decision]]:
        """For each delta and for both: by all carriers, as PLAN.md says, and without those that its fine-tune came from."""
        decided = {}
        for name in (*DELTAS, "both"):
            curves = self.together() if name == "both" else self.alone(name)
            others = {carrier: curve for carrier, curve in curves.items() if carrier not in PARENTS.get(name, ())}
            decided[name] = decide(curves), decide(others)
        return decided

    def claims(self) -> str:
        """The first paragraph: what is shown, refuted and open."""
        sentences = []
        for name, (decision, others) in self.decisions().items():
            what = "both deltas at once" if name == "both" else f"the delta `{DELTAS[name]}`"
            sentences.append(f"That alkahest is needed for {what} is **{decision.verdict}**: {_reason(decision)}.")
            if name in PARENTS:
                said = " and ".join(PARENTS[name])
                sentences.append(
                    f"Without {said}, which it was made from, it is **{others.verdict}**: {_reason(others)}."
                )
        return " ".join(sentences)

    # ---- tables

    def members(self) -> str:
        path = self.bench.members / "record.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        rows = []
        for name in SHIPPED:
            square, wide, high = (Drawing(Mix(name), drawings.WAYS[name], size=size) for size in SIZES)
            read, way = self.read(square), drawings.WAYS[name]
            rows.append(
                [
                    name,
                    *_trained(record.get(name, {})),
                    f"{way.steps} steps, {'guidance 3' if way.guidance else 'no guidance'}, shift {way.shift:g}",
                    share(read["adherent"]),
                    *self.by_kind(square),
                    share(self.right(wide)),
                    share(self.right(high)),
                    *(share(read[character]) for character in DELTAS),
                ]
            )
        sizes = [f"{width} x {height}" for width, height in SIZES[1:]]
        head = ["", "steps", "time", "drawn by", "all", "one", "two", "held out", *sizes, *DELTAS]
        return table(head, rows)

    def naive(self) -> str:
        rows = []
        for mix in drawings.NAIVE.values():
            drawing = Drawing(mix)
            read = self.read(drawing)
            beside = [self.right(Drawing(Mix(name), drawings.WAYS[name])) for name in ("base", _other(mix), "alkahest")]
            leads = [points(difference(read["adherent"], right)) for right in beside]
            parts = [share(read[part]) for part in ("figures", "relation")]
            rows.append([mix.label, share(read["adherent"]), *self.by_kind(drawing), *parts, *leads])
        head = ["pictures of", "all", "one", "two", "held out", "figures", "and relation"]
        return table([*head, "less base", "less the other", "less alkahest"], rows)

    def deltas(self) -> str:
        parts = []
        for character, delta in DELTAS.items():
            text = _curves(self.alone(character))
            parts.append(f"`{delta}`: pictures that show their prompt and are {character}.\n\n{text}")
        return "\n\n".join(parts)

    def both(self) -> str:
        best = self.best()
        text = _curves(self.together())
        multipliers = "; ".join(
            f"{LABELS.get(carrier, carrier)} {' and '.join(f'{scale:g}' for scale in scales.values())}"
            for carrier, scales in best.items()
        )
        said = f"Shares are of the multipliers that are best alone ({' and '.join(DELTAS)}): {multipliers}."
        return f"{text}\n\n{said}"

    def wrong(self) -> str:
        rows: list[Line] = []
        for delta, character in drawings.WRONG.items():
            right = DELTAS[character]
            shown = {name: list(drawings.curve("alkahest", name).values()) for name in (right, delta)}
            arrived = {name: [self.right(row, character) for row in curve] for name, curve in shown.items()}
            for name, curve in shown.items():
                line = [f"`{name}`", character, *map(share, arrived[name])]
                rows += [line, [f"`{name}`", "or not", *(share(self.right(row)) for row in curve)]]
            less = [points(difference(*pair)) for pair in zip(arrived[delta], arrived[right], strict=True)]
            rows.append([f"`{delta}` less `{right}`", character, *less])
        unique = list(dict.fromkeys(map(tuple, rows)))
        return table(["alkahest + m * ...", "adherent and", *(f"m = {m:g}" for m in drawings.MULTIPLIERS)], unique)

    def two_stages(self) -> str:
        columns = {prompts: drawings.stages(prompts) for prompts in drawings.STAGE_PROMPTS}
        rows = []
        for label, drawing in columns["one"].items():
            cells = []
            for rows_of in columns.values():
                shown, base, turbo = (self.right(rows_of[key]) for key in (label, "base alone", "turbo alone"))
                cells.append(share(shown))
                cells += [points(difference(shown, other)) for other in (base, turbo)]
            distances = ["", ""]
            if drawing.second:
                read = [self.read(column[label]) for column in columns.values()]
                keys = ("structural distance", "colour distance")
                distances = [f"{np.mean([one[key] for one in read]):.3f}" for key in keys]
            start = f"{drawing.refinement.levels()[0]:.3f}" if drawing.second else "1"
            evaluations = f"{drawing.way.steps} × {2 if drawing.way.guidance else 1}"
            evaluations += f" + {drawing.evaluations}" if drawing.second else ""
            rows.append([label, evaluations, start, *cells, *distances])
        head = [cell for prompts in columns for cell in (prompts, "less base", "less turbo")]
        return table(
            ["pictures of", "evaluations", "start sigma", *head, "structural distance", "colour distance"], rows
        )

    def loras(self) -> str:
        rows = []
        for delta in drawings.LORAS:
            for strength in drawings.LORA_STRENGTHS:
                cells = []
                for way in (drawings.FEW, drawings.MANY):
                    drawing, whole = drawings.lora(delta, strength, way)
                    by_lora, full = self.right(drawing), self.right(whole)
                    far = np.mean(self.read(drawing)["structural distance"])
                    cells += [share(by_lora), share(full), points(difference(by_lora, full)), f"{far:.3f}"]
                rows.append([f"`{delta}`", f"{strength:g}", *cells])
        head = ["full", "less full", "structural distance"]
        return table(["difference", "strength", "4 steps: LoRA", *head, "30 steps: LoRA", *head], rows)

    def verify(self) -> str:
        rows = []
        for made, kinds in drawings.kinds(*self.alkahest()).items():
            for drawing in kinds:
                output, others = self._looked(drawing), [self._looked(row) for row in drawings.parents(drawing)]
                counts, said = output.counts(), refusals(output, others)
                counted = [str(counts.get(name, "")) for name in ("noise", "collapsed", "drift", "adherence")]
                refused = [f"{100 * said[name]:.1f} %" for name in ("unlike", "adherence", "any")]
                rows.append([made, drawing.mix.label, *counted, *refused])
        counts_head = ["noise", "collapsed", "drift", "not adherent"]
        return table(["", "pictures of", *counts_head, "runs: unlike", "runs: adherence", "verify says no"], rows)

    def _looked(self, drawing: Drawing) -> Looked:
        second = drawings.checked(drawing)
        return Looked.of(self.read(drawing), self.read(second) if second else None)


def _curves(curves: Mapping[str, Curve]) -> str:
    """Carriers by multiplier over all pictures, and what the decision counts on its half."""
    decision, rows = decide(curves), []
    for carrier, curve in curves.items():
        lead = decision.leads.get(carrier)
        cells = [share(right) for right in curve.values()]
        counted = [f"{decision.best[carrier]:g}", percent(decision.counted[carrier]), points(lead) if lead else ""]
        rows.append([LABELS.get(carrier, carrier), *cells, *counted])
    head = [f"{scale:g}" for scale in next(iter(curves.values()))]
    return table(["carrier", *head, "best", "other half", "alkahest's lead"], rows)


def _reason(decision: Decision) -> str:
    """The carrier that comes closest to alkahest, or leads it most."""
    carrier = min(decision.leads, key=lambda name: decision.leads[name].mean)
    lead, counted = decision.leads[carrier], decision.counted
    return (
        f"alkahest draws {percent(counted['alkahest'])} at {decision.best['alkahest']:g}, "
        f"{LABELS.get(carrier, carrier)} {percent(counted[carrier])} at {decision.best[carrier]:g}, a lead of {points(lead)} points"
    )


def _other(mix: Mix) -> str:
    return next(name for name in mix.names if name != "base")


def _trained(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Steps and minutes of a member's training, of its record."""
    rounds = [one for one in entry.get("rounds", ()) if "pieces" in one]
    seconds = sum(piece["cpu_seconds"] for one in rounds for piece in one["pieces"])
    return (f"{sum(one['steps'] for one in rounds):,}", f"{seconds / 60:.0f} min") if rounds else ("", "")


def fill(page: Path, name: str, text: str) -> None:
    """Put a text between its markers in a page. Raises SystemExit where the page has none."""
    before = page.read_text()
    pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(before):
        raise SystemExit(f'{page} has no place for "{name}": add the lines <!-- table: {name} --> and <!-- end -->.')
    page.write_text(pattern.sub(lambda place: f"{place[1]}{text}\n{place[2]}", before))
