"""Every error that mergetool raises on purpose, and its exit code on the command line.

    MergetoolError
    ├── CheckFailed        1    a check said no
    ├── UsageError         2    the request itself is wrong
    │   ├── ExpressionError     a merge expression that cannot be read or has the wrong degree
    │   ├── PatternError        a selection pattern that is malformed or matches nothing
    │   └── RecipeError         a recipe file that cannot be read, or asks for what there is not
    ├── DataError         65    an input's bytes are not what they should be
    │   ├── HeaderError         a safetensors header breaks a rule of the format
    │   ├── ShardIndexError     a shard index is malformed, unsafe, or disagrees with its shards
    │   ├── FamilyError         a file is not a model this tool can merge, or two models do not fit
    │   │   └── LineageError        two models fit, and a merge of them as asked makes noise
    │   └── NonFiniteError      NaN or infinity where a finite number is needed
    ├── InputMissing      66    an input does not exist or may not be opened
    ├── PackageError      69    a package that is needed is missing, too old or broken
    ├── OutputError       73    the output cannot be made at the place asked for
    ├── DeviceError       70    a GPU failed while it worked
    ├── StorageError      74    reading or writing failed
    └── BusyError         75    another run holds the output

A run that the user stops ends with 130 and no error of these.

A message is one sentence: what, where, found, wanted, what to do next.
"""

from __future__ import annotations

import re


class MergetoolError(Exception):
    """Root of every error raised on purpose; the command line returns its ``exit_code``.

    Its text is one line: line breaks, tabs and other controls, which names can hold, are written as escapes.
    """

    exit_code = 1

    def __init__(self, sentence: str = "") -> None:
        super().__init__(re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", lambda match: ascii(match[0])[1:-1], sentence))


class CheckFailed(MergetoolError):
    """A check the user asked for said no."""

    exit_code = 1


class UsageError(MergetoolError):
    """The request itself is wrong: an option, an expression, a combination."""

    exit_code = 2


class ExpressionError(UsageError):
    """A merge expression that cannot be read, or whose degree is wrong."""


class PatternError(UsageError):
    """A selection pattern that is malformed or matches nothing."""


class RecipeError(UsageError):
    """A recipe file that cannot be read, or asks for the impossible; it gives line and column."""


class DataError(MergetoolError):
    """An input with broken or unexpected bytes."""

    exit_code = 65


class HeaderError(DataError):
    """A safetensors header breaks a rule of the format."""


class ShardIndexError(DataError):
    """A shard index is malformed, unsafe, or disagrees with its shards."""


class FamilyError(DataError):
    """A file is not a model this tool can merge, or two models do not fit together."""


class LineageError(FamilyError):
    """Models that fit but do not belong together; the option ``force`` merges them anyway."""


class NonFiniteError(DataError):
    """NaN or infinity where a finite number is needed."""


class InputMissing(MergetoolError):
    """An input does not exist or may not be opened."""

    exit_code = 66


class PackageError(MergetoolError):
    """A package that is needed is not installed, too old, or cannot be imported."""

    exit_code = 69


class OutputError(MergetoolError):
    """The output cannot be made at the place asked for."""

    exit_code = 73


class DeviceError(MergetoolError):
    """A GPU failed while it worked."""

    exit_code = 70


class StorageError(MergetoolError):
    """Reading or writing failed."""

    exit_code = 74


class BusyError(MergetoolError):
    """Another run holds the output."""

    exit_code = 75
