"""What the commands that make one LoRA out of others have in common: their options, what they do, what they print."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.adapters.loaders import loading_of
from mergetool.cli import console, loads
from mergetool.cli.diff_ranks import GROUPS
from mergetool.errors import UsageError

if TYPE_CHECKING:
    from mergetool.checkpoint.dtypes import DType
    from mergetool.lora.combine import Combined, Derive, Outcome
    from mergetool.lora.gathering import Gathering
    from mergetool.lora.selection import Selection
    from mergetool.options.multipliers import Setting

OutputOption = Annotated[str | None, typer.Option("--output", "-o", help="FILE.safetensors. Needed unless --dry-run.")]
RankOption = Annotated[
    int | None, typer.Option("--rank", help="The same rank for every module, fewer where it has no more.")
]
RankThreshOption = Annotated[
    float | None, typer.Option("--rank-thresh", help="Keep this much of every module, as --rule measures it.")
]
RuleOption = Annotated[
    str | None,
    typer.Option("--rule", help="energy [default], fro, sum, ratio, abs or knee (which needs no threshold)."),
]
RankMaxOption = Annotated[
    int | None, typer.Option("--rank-max", help="Cap of the rank, beside a threshold or a budget.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="The model to look names up in [default: Z-Image].", metavar="MODEL"),
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", help="The least error of all modules together for a file of this size.", metavar="SIZE"),
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="bf16, fp16 or fp32 [default: that of the factors that are read]")
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", help="Modules worked on at once [default: all cores]", min=1, max=256)
]
SkipOption = Annotated[bool, typer.Option("--skip-unmatched", help="Skip (and list) LoRA keys of no known module.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Scale all strengths in a group; 0 leaves it out. Repeatable; later wins.", metavar="GROUP=MULT"
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be read, and stop.")]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a command was asked for besides its LoRAs."""

    command: str
    output: str | None
    selection: Selection
    dtype: DType | None = None
    multipliers: tuple[Setting, ...] = ()
    model: str | None = None
    threads: int | None = None
    skip_unmatched: bool = False
    overwrite: bool = False
    dry_run: bool = False
    as_json: bool = False
    shows_progress: bool = True
    verbose: bool = False


def selection(
    rank: int | None,
    rank_thresh: float | None,
    rule: str | None,
    budget: str | None,
    rank_max: int | None = None,
    *,
    needed: bool,
) -> Selection:
    """What the options ask to keep. Raises UsageError for several that contradict each other, or for none where one is ``needed``."""
    from mergetool.lora.rules import Rule
    from mergetool.lora.selection import Budget, ByRule, Exact, Fixed
    from mergetool.options.differences import RULES, SHARE, require_threshold

    name = console.choice("--rule", rule or "energy", RULES)
    by_rule = rank_thresh is not None or rule is not None
    given = [
        option
        for option, there in (
            ("--rank", rank is not None),
            ("--rank-thresh", by_rule),
            ("--budget", budget is not None),
        )
        if there
    ]
    if len(given) > 1:
        raise UsageError(
            f"{' and '.join(given)} contradict each other; give one of them; --rank-max caps a threshold or a budget."
        )
    if rank is not None:
        if rank_max is not None:
            raise UsageError(
                "--rank and --rank-max contradict each other; --rank-max goes with a threshold or a budget."
            )
        return Fixed(rank)
    if budget is not None:
        return Budget(console.parse_size(budget), rank_max)
    if by_rule:
        if rank_thresh is None and name != "knee":
            raise UsageError(f"--rule {name} needs a --rank-thresh.")
        require_threshold(name, rank_thresh)
        return ByRule(Rule(name, SHARE if rank_thresh is None else rank_thresh), rank_max)
    if rank_max is not None:
        return Fixed(rank_max)
    if needed:
        raise UsageError("say how much to keep: --rank N, --rank-thresh T, --rule knee or --budget SIZE.")
    return Exact()


def output_dtype(name: str | None) -> DType | None:
    """The dtype of ``--dtype``; None where none was given. Raises UsageError."""
    from mergetool.checkpoint import dtypes

    if name is None:
        return None
    chosen: str = console.choice("--dtype", name, ("bf16", "fp16", "fp32"))
    return dtypes.output_dtype(chosen)


def perform(
    loras: Sequence[tuple[str, Fraction]],
    settings: Settings,
    *,
    prepare: Callable[[Gathering], Gathering] = lambda gathering: gathering,
    derive: Callable[[Gathering], Derive] | None = None,
) -> None:
    """Read, print what there is, combine, print what became of it; ``prepare`` changes the pieces, ``derive`` what is made of them."""
    from mergetool import models
    from mergetool.lora.combine import combine
    from mergetool.lora.gathering import gather, opened
    from mergetool.lora.selection import Budget

    if settings.output is None and not settings.dry_run:
        raise UsageError("say where to write: -o FILE.safetensors, or --dry-run.")
    target = None if settings.output is None else console.lora_output(settings.output, shown=not settings.as_json)
    started = time.monotonic()
    anatomy = None
    if settings.model is not None:
        with models.open_model(settings.model, names_only=True) as model:
            anatomy = model.anatomy
    with opened(loras, anatomy=anatomy) as terms:
        gathering = prepare(
            gather(
                terms,
                multipliers=settings.multipliers,
                skip_unmatched=settings.skip_unmatched,
                names_known=anatomy is not None,
            )
        )
        if not settings.as_json:
            _print_plan(gathering, verbose=settings.verbose or settings.dry_run)
        if settings.dry_run or target is None:
            if settings.as_json:
                console.print_json(_plan_json(gathering, settings.command))
            return
        passes = 2 if isinstance(settings.selection, Budget) else 1
        with console.progress(
            settings.command[:7],
            passes * len(gathering.modules),
            shown=settings.shows_progress,
            unit=" modules",
            publishes=True,
        ) as bar:
            done = combine(
                gathering,
                target,
                settings.selection,
                dtype=settings.dtype,
                command=settings.command,
                derive=derive(gathering) if derive else None,
                overwrite=settings.overwrite,
                threads=settings.threads,
                progress=bar,
            )
        seconds = time.monotonic() - started
        if settings.as_json:
            console.print_json(
                _plan_json(gathering, settings.command)
                | _done_json(done, target, seconds)
                | {"loading": loads.as_json(loading_of(target, gathering.family))}
            )
        else:
            _print_done(gathering, done, settings, target, seconds)


def in_group(groups: frozenset[str]) -> str:
    """The row of the tables that a module is in: the first of `diff_ranks.GROUPS`, or other."""
    return next((group for group in GROUPS if group in groups), "other")


def warnings(gathering: Gathering) -> Iterator[str]:
    """Everything that a user of the files should know."""
    from mergetool.adapters import matching

    for term in gathering.terms:
        for warning in term.file.warnings:
            yield f"{term.file.name}: {warning}"
        yield from matching.remarks(term.file)


def _print_plan(gathering: Gathering, *, verbose: bool) -> None:
    for i, term in enumerate(gathering.terms):
        count = console.plural(len(term.file.changes), "change")
        ranks = sorted({one.rank for one in term.file.adapters if one.rank is not None})
        width = f", rank {_range(ranks)}" if ranks else ""
        kinds = sorted({one.kind for one in term.file.adapters} - {"lora"})
        other = f", {' and '.join(kinds)}" if kinds else ""
        console.heading(
            "" if i else "read",
            f"{float(term.strength):g} x {term.file.name}: {count}{width}{other}  {term.file.dialect}",
        )
    for warning in warnings(gathering):
        console.heading("note", warning)
    reasons: dict[str, list[str]] = {}
    for name, reason, _ in gathering.left_out:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        shown = console.listed(names, most=len(names) if verbose else 2)
        console.heading("", f"{len(names)} left out ({reason}): {shown}")
    if verbose:
        for module in gathering.modules:
            pieces = " + ".join(
                f"{float(piece.strength):g} x {piece.change.adapter.kind} {piece.change.adapter.rank or ''}".rstrip()
                for piece in module.pieces
            )
            console.heading("", f"{module.part}  {list(module.shape)}  {pieces}")


def _print_done(gathering: Gathering, done: Combined, settings: Settings, target: Path, seconds: float) -> None:
    rows = []
    for group in (*GROUPS, "other"):
        chosen = [one for one in done.modules if in_group(one.groups) == group]
        if chosen:
            rows.append(_row(group, chosen))
    console.heading("ranks", "")
    console.table(["group", "modules", "rank read", "rank min/med/max", "energy", "residual"], rows)
    if done.capped:
        wanted = max(one.wanted or 0 for one in done.capped)
        capped = [f"{one.name} wants {one.wanted}" for one in done.capped]
        console.heading(
            "",
            f"{len(capped)} stopped by --rank-max, which would have to be {wanted}: "
            f"{console.listed(capped, most=len(capped) if settings.verbose else 2)}",
        )
    if done.empty:
        names = console.listed(done.empty, most=len(done.empty) if settings.verbose else 2)
        console.heading("", f"{len(done.empty)} not written, nothing of them is left: {names}")
    if settings.verbose:
        for one in done.modules:
            console.heading(
                "",
                f"{one.name}  rank {one.rank}  energy {one.energy:.5f}  residual {one.residual:.2%}  {one.dtype.name}",
            )
    lost = sum(energy for _, _, energy in gathering.left_out if energy is not None)
    kept = sum(one.total for one in done.modules)
    if lost:
        console.heading("", f"{100 * lost / (lost + kept):.2g} % of the energy is left out, which no LoRA can carry")
    console.heading(
        "done",
        f"{target}  {console.size(target.stat().st_size)}  {seconds:.1f} s   residual {done.residual:.2%}",
    )
    loads.print_all(loading_of(target, gathering.family), verbose=settings.verbose)


def _row(group: str, chosen: Sequence[Outcome]) -> list[str]:
    ranks = sorted(one.rank for one in chosen)
    widths = sorted(one.width for one in chosen if one.width is not None)
    total = sum(one.total for one in chosen)
    energy = sum(one.energy * one.total for one in chosen) / total if total else 1.0
    residual = (sum(one.residual**2 * one.total for one in chosen) / total) ** 0.5 if total else 0.0
    return [
        group,
        str(len(chosen)),
        _range(widths) if widths else "",
        f"{ranks[0]} / {ranks[len(ranks) // 2]} / {ranks[-1]}",
        f"{energy:.5f}",
        f"{100 * residual:.2f} %",
    ]


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _plan_json(gathering: Gathering, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "family": gathering.family.name,
        "loras": [
            {
                "name": term.file.name,
                "strength": float(term.strength),
                "dialect": term.file.dialect,
                "changes": len(term.file.changes),
                "warnings": list(term.file.warnings),
            }
            for term in gathering.terms
        ],
        "modules": [module.part for module in gathering.modules],
        "left_out": [{"name": name, "reason": reason, "energy": energy} for name, reason, energy in gathering.left_out],
    }


def _done_json(done: Combined, target: Path, seconds: float) -> dict[str, Any]:
    return {
        "output": str(target),
        "bytes_written": target.stat().st_size,
        "seconds": round(seconds, 3),
        "residual": done.residual,
        "modules": [
            {
                "name": one.name,
                "shape": list(one.shape),
                "rank_read": one.width,
                "rank": one.rank,
                "energy": one.energy,
                "residual": one.residual,
                "norm": one.total**0.5,
                "dtype": one.dtype.name,
                "rank_wanted": one.wanted,
            }
            for one in done.modules
        ],
        "empty": done.empty,
    }
