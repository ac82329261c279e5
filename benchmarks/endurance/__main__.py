"""Runs campaigns: `python -m benchmarks.endurance [CAMPAIGN ...] [--count N] [--minutes M]`."""

import sys

from benchmarks.endurance import calls, data_rows, kills, mutations, rounds, strings, trainings
from benchmarks.endurance.campaign import main_of

MODULES = (strings, mutations, calls, kills, trainings, rounds, data_rows)
CAMPAIGNS = tuple(module.CAMPAIGN for module in MODULES)

if __name__ == "__main__":
    sys.exit(main_of(CAMPAIGNS, None))
