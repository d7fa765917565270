"""What `bench/gpu_report.py` is made of: timing, cases, sweeps, whole models, and the report.

The checkout serves as the installation: a machine that is lent for minutes need not install anything.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "python"), str(ROOT / "bench")) if path not in sys.path]
