"""``uniprune``, ``python -m uniprune``, and what ``torchrun -m uniprune`` starts."""

import signal
import sys


def main() -> None:
    """The command line. It may be interrupted from the first import on, and no more when its work is done."""
    try:
        from uniprune.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
