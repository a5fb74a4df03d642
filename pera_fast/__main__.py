"""`python -m pera_fast` is `pera-fast`."""

from pera_fast.cli import main

if __name__ == "__main__":
    main()
