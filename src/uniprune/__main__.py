"""``uniprune``, ``python -m uniprune``, and what ``torchrun -m uniprune`` starts."""

import signal
import sys


def main() -> None:
    """The command line, which may be interrupted from its first import on, and no more once its work is done."""
    try:
        from uniprune.cli.main import main as run

        run()
    except KeyboardInterrupt:
        _end(signal.SIG_DFL)
        sys.exit("error: interrupted")
    except SystemExit as done:
        _end(signal.SIG_DFL if done.code else signal.SIG_IGN)
        raise


def _end(interrupted: signal.Handlers) -> None:
    """What Ctrl-C does while Python ends: as an exception it would only print a traceback. SIG_DFL: it ends at once."""
    signal.signal(signal.SIGINT, interrupted)


if __name__ == "__main__":
    main()
