"""What tests of several rooms share."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipeline folders ``base`` and ``turbo``, of random weights."""
    from tests.pipelines import family

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers and transformers warn on saving
        return family(tmp_path_factory.mktemp("pipelines"))
