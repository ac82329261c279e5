"""Runs the command line as `python -m chatglm`."""

import sys

try:
    from chatglm.cli import main
    from chatglm.training.processes import leave
except KeyboardInterrupt:
    sys.exit(130)  # as `cli.INTERRUPTED`, which may not have been imported
leave(main())
