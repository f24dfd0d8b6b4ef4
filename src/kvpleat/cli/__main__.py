"""`python -m kvpleat.cli`: the `kvpleat` command, for launchers that start modules."""

from kvpleat.cli import main

if __name__ == "__main__":
    main()
