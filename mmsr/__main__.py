"""`python -m mmsr` is the command line."""

from mmsr.cli import main

main()
