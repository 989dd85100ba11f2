"""`python -m ltfast` is the command `ltfast`."""

from ltfast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
