"""`python -m mmsr` is the command line."""

from mmsr.cli import main

if __name__ == "__main__":
    main()
