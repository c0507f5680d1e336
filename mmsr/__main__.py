"""`mmsr` and `python -m mmsr`: the command line; without a word when stopped while it loads."""

import os
import signal
import sys

from mmsr import __version__


def main() -> None:
    """Load the command line and run it, with its help if nothing is asked; or say the version."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"mmsr {__version__}")
        return
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so under nohup
    if heeded:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from mmsr.app.cli import main as run

    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run(arguments or ["--help"])


if __name__ == "__main__":
    main()
