"""A service that cannot start."""

import sys

sys.exit("the model is missing: train one")
