"""``python -m mergetool``."""

from mergetool.cli.main import main

if __name__ == "__main__":
    main()
