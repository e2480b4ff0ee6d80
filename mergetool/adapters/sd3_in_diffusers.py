"""diffusers' ``SD3LoraLoaderMixin`` as a table: the modules that it makes of keys.

It converts nothing: what stands under ``transformer.`` is looked up as it is, and other prefixes are ignored in silence.
"""

from __future__ import annotations

from collections.abc import Collection

from mergetool.adapters.in_diffusers import as_stored

RELEASES = ("0.42.1",)
"""The releases that the tests run; mergetool forecasts no others."""


def modules(keys: Collection[str], release: str = RELEASES[0]) -> dict[str, set[str]]:
    """The modules that get a layer, by the names in the model, with the keys of each.

    Raises ``in_diffusers.Rejected`` where ``release`` raises an error.
    """
    return as_stored([key for key in keys if "dora_scale" not in key])
