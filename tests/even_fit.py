"""``viasd fit`` with costs that do not vary, so that two runs on one machine take the same route.

A script of its own, because Lightning starts the further processes of strategy ``ddp`` by running the first one's anew.
"""

from __future__ import annotations

import sys
from unittest.mock import patch

from tests.tiny import even_costs
from viasd_calib.cli.fit import fit
from viasd_calib.training import student

if __name__ == "__main__":
    with patch.object(student, "sublayer_costs", even_costs):
        fit(sys.argv[1:])
