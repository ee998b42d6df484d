"""A service that serves the first time it is started, and fails every time after."""

import os
import runpy
import sys
from pathlib import Path

marker = Path(os.environ["CONSOLE_TEST_MARKER"])
if marker.exists():
    sys.exit("not again")
marker.touch()
runpy.run_module("steady_service", run_name="__main__")
