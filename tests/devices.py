"""A script in a process of its own, on so many simulated devices."""

import os
import subprocess
import sys
from pathlib import Path


def on_devices(count: int, script: str, *args: str, timeout: float = 240) -> str:
    """What a script prints, run with so many devices of the CPU; it fails with what the script said."""
    here = Path(__file__).parent
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    run = subprocess.run(
        [sys.executable, "-c", script, *args],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]
