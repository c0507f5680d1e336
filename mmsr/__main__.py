"""`mmsr` and `python -m mmsr`: the command line; without a word when stopped while it loads."""

import os
import signal


def main() -> None:
    """Load the command line and run it."""
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so under nohup
    if heeded:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from mmsr.app.cli import main as run

    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
