"""``python -m structprune``: the command line."""

from structprune.cli import main

if __name__ == "__main__":
    main()
