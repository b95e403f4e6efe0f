"""The command `kdvit`, and `python -m kdvit`."""

import os
import sys

from kdvit.runtime.signals import REQUESTS, REQUEUE

if sys.argv[1:2] in (["fit"], ["cache"]):
    REQUESTS.listen(*REQUEUE)  # before the imports, which take seconds
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported: threads that wait for work sleep

from kdvit.cli import main

if __name__ == "__main__":
    main()
