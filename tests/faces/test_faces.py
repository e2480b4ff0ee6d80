"""What the faces differ in, against the list of what they are known to differ in: neither more nor less."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.faces.probes import REQUESTS, answers
from tests.faces.walk import COMMANDS, differences

LISTED = Path(__file__).with_name("differences.txt")


def listed() -> set[str]:
    return {line for line in LISTED.read_text("utf-8").splitlines() if line and not line.startswith("#")}


def compare(found: set[str], known: set[str]) -> None:
    """Fails with the lines to take out of the list, and with those that may not come in."""
    new, gone = sorted(found - known), sorted(known - found)
    assert not new, "the faces differ in more than they did; give all of them the same:\n" + "\n".join(new)
    assert not gone, f"the faces agree now; take these lines out of {LISTED.name}:\n" + "\n".join(gone)


@pytest.mark.parametrize("operation", ["merge", "diff", "compare", "sample", "verify", "replay"])
def test_the_faces_have_the_options_of_each_other_but_for_those_listed(operation: str) -> None:
    known = {line for line in listed() if line.startswith(f"{operation}: ")}
    compare(differences(operation), known)


def test_every_listed_line_is_of_an_operation() -> None:
    starts = {line.split(":")[0] for line in listed()}
    assert starts <= {*COMMANDS, *(f"{operation} with" for operation in REQUESTS)}


@pytest.mark.parametrize("operation", REQUESTS)
def test_the_faces_refuse_what_each_other_refuse_but_for_what_is_listed(operation: str, family: Path) -> None:
    found = set()
    for request in REQUESTS[operation]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = answers(operation, request, family)
        asked = ", ".join(f"{name} {value!r}" for name, value in request.items())
        if len(set(said.values())) > 1 or any(one.startswith("ends in") for one in said.values()):
            shown = ", ".join(f"the {face} {one}" for face, one in said.items())
            found.add(f"{operation} with: {asked}: {shown}")
    compare(found, {line for line in listed() if line.startswith(f"{operation} with: ")})
