"""The program, ``mergetool`` or ``python -m mergetool``.

It is here, outside the command line, to say in a sentence that a package of the command line cannot be imported.
"""

from __future__ import annotations

import sys

from mergetool import packages
from mergetool.errors import PackageError


def main() -> None:
    """Run the command line."""
    try:
        with packages.told():
            from mergetool.cli.main import main as run
    except PackageError as error:
        print(f"mergetool: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    run()


if __name__ == "__main__":
    main()
