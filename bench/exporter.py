"""The process that makes what runtimes beside torch load, and the outputs they are held against (client.py's lines)."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder's own place on the path goes; an installed hbert comes before the checkout
    sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parents[1])]

from bench.client import end_with_coordinator
from bench.worker import serve


def main() -> None:
    def server() -> object:
        from bench.exports import Exporter

        return Exporter()

    end_with_coordinator()
    serve(lambda: {}, server)


if __name__ == "__main__":
    main()
