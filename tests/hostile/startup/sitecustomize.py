"""On the import path of every process that a watched command starts: Python imports it before anything else."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import spy

del sys.path[0]
spy.watch_by_environment()
