"""`python -m deploy.dashboard RUN`: the server process that a run starts beside itself."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from deploy.dashboard.process import read_token
from deploy.dashboard.server import serve

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8270)
    parser.add_argument("--token-file")
    parser.add_argument("--with-parent", action="store_true")
    arguments = parser.parse_args()
    os.nice(10)  # training goes first
    serve(arguments.run, arguments.host, arguments.port, read_token(arguments.token_file), arguments.with_parent)
