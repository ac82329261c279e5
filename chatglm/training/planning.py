"""Owns the name of the command `python -m chatglm.training.planning`, which people type.

Does not know what it does: that is `chatglm.training.estimate.report`.
"""

import sys

from chatglm.training.estimate.report import main

if __name__ == "__main__":
    sys.exit(main())
