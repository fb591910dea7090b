"""``python -m flix.cli``."""

from flix.cli import main

if __name__ == "__main__":
    main()
