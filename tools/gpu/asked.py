"""What a run was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".gpu" / "cache"


@dataclass(frozen=True)
class Asked:
    """The options that stages see. ``case`` and ``every`` choose among the items of a stage."""

    out: Path
    seed: int = 0
    case: str = ""
    every: int = 1
    dry: bool = False
