"""Where and of what a result was measured."""

from __future__ import annotations

import os
from datetime import date


def machine_note() -> dict[str, str]:
    """Machine, commit and day; the load is that before the benchmark's own work."""
    from luthier.claims.claim import commit, machine

    return {
        "machine": f"{machine()}, load before {os.getloadavg()[0]:.1f}",
        "commit": commit(),
        "day": date.today().isoformat(),
    }
