"""``python -m hbert``: the same as the ``hbert`` command."""

import sys

from hbert.cli import main

if __name__ == "__main__":
    sys.exit(main())
