"""Runs the command line as `python -m chatglm`."""

from chatglm.cli import main
from chatglm.training.processes import leave

leave(main())
