"""`python -m rayk` is `rayk`."""

from rayk.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
