"""What all tests share."""

import os

# Set before torch starts its threads, for the tests and for the commands they run. Many small operations on few cores run
# several times slower with threads that wait for each other; pytest-xdist runs one process per core instead.
os.environ.setdefault("OMP_NUM_THREADS", "1")
