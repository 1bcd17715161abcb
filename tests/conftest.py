"""Helpers that tests of several rooms use are imported by their plain names: managers, redis_places, ..."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOMS = (
    "connector",
    "blend",
    "storage",
    "storage/disk",
    "storage/indexed",
    "storage/testing",
    "storage/flow",
    "storage/objects",
    "storage/redis",
)
sys.path[:0] = [str(HERE / room) for room in ROOMS]
