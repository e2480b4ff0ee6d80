"""Is a result right? Its bytes against its recipe, and its pictures beside those of its parents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from mergetool.api.events import Events, Request
from mergetool.api.functions import called
from mergetool.options.kinds import ModelName
from mergetool.options.table import Option, part, values
from mergetool.options.verifying import RebuildOptions, VerifyOptions

if TYPE_CHECKING:
    from mergetool.verification.checks import Verification
    from mergetool.verification.replay import Replay


@dataclass(frozen=True)
class Verify(Request, VerifyOptions):
    """A merge, or any model, to be verified."""

    output: Annotated[
        str,
        Option(
            help="A merge, or any model.",
            kind=ModelName("OUT", stored=True),
            argument=True,
            missing={"recipe": "a recipe verifies what it makes"},
        ),
    ]


@dataclass(frozen=True)
class Rebuild(Request, RebuildOptions):
    """A merge to be done again."""

    output: Annotated[
        str, Option(help="A merge that mergetool made.", kind=ModelName("OUT", stored=True), argument=True)
    ]


def run_verify(asked: Verify, events: Events) -> Verification:
    """Derive every tensor of a merge again, then look at its pictures beside the parents'.

    To the ``depth`` of bytes it compares the whole file, header and metadata too, and ``write_to`` keeps the new one. A file without a recipe
    is measured against ``parents``, and judged by its pictures alone. ``images`` True makes pictures, False does not, None does on a GPU
    or for a small model. Failed checks are in the result; an exception is raised for impossible ones.
    """
    from mergetool.verification import checks

    verification = checks.verify(asked.output, asked, events.progress)
    events.done(asked, verification)
    return verification


def run_replay(asked: Rebuild, events: Events) -> Replay:
    """Make a merge again from its metadata's recipe, and compare every byte.

    The file or the whole folder counts. It equals `verify` to the depth of bytes, without pictures. The result lists each difference with its reason. Raises MergetoolError.
    """
    how = values(part(RebuildOptions, asked))
    verification = run_verify(Verify(asked.output, depth="bytes", images=False, **how), events)
    assert verification.replay is not None
    return verification.replay


verify = called(Verify, run_verify, "verify")
replay = called(Rebuild, run_replay, "replay")
