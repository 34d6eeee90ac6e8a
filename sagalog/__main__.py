"""`python -m sagalog`: the command line."""

from sagalog.cli import main

if __name__ == "__main__":
    main()
