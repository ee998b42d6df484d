"""A service that serves the first time it is started, and fails every time after."""

import os
import sys
from pathlib import Path

from steady_service import main

if __name__ == "__main__":
    marker = Path(os.environ["CONSOLE_TEST_MARKER"])
    if marker.exists():
        sys.exit("not again")
    marker.touch()
    sys.exit(main())
