"""Run every point of a sweep and report the best: python scripts/sweep.py SWEEP.toml (docs/sweeps.md)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's dtron, even if another is installed

from dtron.cluster.sweep import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
