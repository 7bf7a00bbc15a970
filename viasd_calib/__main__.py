"""``python -m viasd_calib`` is the ``viasd`` command."""

import sys

from viasd_calib.cli import main

if __name__ == "__main__":
    sys.exit(main())
