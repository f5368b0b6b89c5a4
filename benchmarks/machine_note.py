"""Where and of what a result was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date


def machine_note() -> dict[str, str]:
    """Machine, commit and day; the load is that before the benchmark's own work."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}"
    return {"machine": machine, "commit": commit.strip(), "day": date.today().isoformat()}
