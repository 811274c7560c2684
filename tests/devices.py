"""A script on so many simulated devices: in a process that has them, kept for the scripts that follow.

The number of devices is settled when JAX starts, and to start it takes longer than many a script. So the processes of
the scripts share what they import and the small programs they compile, and nothing else: each has its own names.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jax


def on_devices(count: int, script: str, *args: str, timeout: float = 240) -> str:
    """The last line that a script prints, with so many devices of the CPU; it fails with what the script said."""
    if count == len(jax.devices()):
        return _last(*run(script, args))
    process = _process(count)
    stop = threading.Timer(timeout, process.kill)
    stop.start()
    process.stdin.write(json.dumps([script, args]) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    stop.cancel()
    if not answer:  # killed, by the timer or by itself
        _process.cache_clear()
    assert answer, f"the process of {count} devices ended within {timeout} seconds, with {process.wait()}"
    return _last(*json.loads(answer))


def _last(said: str, error: str) -> str:
    assert not error, error
    return said.strip().splitlines()[-1] if said.strip() else ""


@cache
def _process(count: int) -> subprocess.Popen:
    here = Path(__file__).parent
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", "import devices; devices.serve()"],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def serve() -> None:
    """Runs a script for each line of the standard input, until its end."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        script, args = json.loads(line)
        answers.write(json.dumps(run(script, args)) + "\n")
        answers.flush()


def run(script: str, args: Sequence[str]) -> tuple[str, str]:
    """What a script prints, and what it fails with."""
    said, own = io.StringIO(), sys.argv
    sys.argv = ["-c", *args]
    try:
        with contextlib.redirect_stdout(said):
            exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    except SystemExit:
        pass
    except BaseException:
        return said.getvalue(), traceback.format_exc()
    finally:
        sys.argv = own
    return said.getvalue(), ""
