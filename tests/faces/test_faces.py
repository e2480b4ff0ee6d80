"""Every face has the options of the table, with its defaults, and refuses what it refuses in its words."""

from __future__ import annotations

import pytest

from tests.faces.probes import answers, plain, probes, wanted
from tests.faces.walk import CLI, NODES, ONLY_COMMANDS, RECIPES, WITHOUT, Operation, commands, operations

OPERATIONS = operations()


def test_every_command_is_walked() -> None:
    walked = {operation.name for operation in OPERATIONS}
    assert {name for name, _ in commands(CLI)} == walked | WITHOUT


def test_every_operation_has_a_function_in_python() -> None:
    assert {operation.name for operation in OPERATIONS if operation.function is None} == ONLY_COMMANDS


def test_every_recipe_and_node_is_of_an_operation_that_is_walked() -> None:
    assert {*RECIPES, *NODES} <= {operation.table for operation in OPERATIONS}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_face_has_the_options_and_defaults_of_the_table(operation: Operation) -> None:
    assert operation.differences() == []


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_face_refuses_what_the_table_refuses_in_its_words(operation: Operation) -> None:
    differing = []
    for asked in probes(operation):
        said = answers(operation, asked)
        differing += [
            f"{asked}: the {face} says {sentence}"
            for face, sentence in said.items()
            if said["api"] == "takes it" or plain(sentence) != wanted(face, said["api"])
        ]
    assert differing == []
