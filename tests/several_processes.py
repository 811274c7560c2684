"""Do several processes train as one does, and what becomes of them where one dies?

The digits of 8x8 pixels that scikit-learn ships, by a dense net and K-FAC, in one process and in several of one device
each: `jax.distributed` on this machine, collectives by gloo. Each process has its part of every batch and of every
refresh. Then the last process is killed in the middle. The others have to end with an error; the run goes on from the
last checkpoint.

Expected: the losses of several processes are those of one up to rounding, and those after the restart are exactly those
of the run that nobody disturbed.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
import tyro
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec
from rich import print as say
from rich.console import Console
from rich.table import Table

import natgrad_jax as ng
from experiments import figures
from experiments.data import digits
from experiments.nets import Perceptron
from experiments.records import save, saved

LIKELIHOOD = ng.losses.softmax_cross_entropy
HERE = Path(__file__).parent
END = re.compile(r"^(?:F\d{4} [^\]]*\] (.*)|([\w.]*Error: .*))", re.MULTILINE)
"""The line with which JAX or Python ends a process; lines of errors that end nothing come in any order before it."""


@dataclass(frozen=True)
class Config:
    """The numbers of a run.

    Attributes:
        processes: how many.
        steps: of training.
        batch: images in a batch, of all processes.
        units: of each hidden layer.
        hidden: how many layers of these.
        every: steps between checkpoints.
        killed: the step after whose loss the last process dies.
        patience: seconds until a process that hears nothing of another gives up, at least 10.
        limit: seconds that any run may take.
    """

    processes: int = 2
    steps: int = 40
    batch: int = 120
    units: int = 32
    hidden: int = 2
    every: int = 10
    killed: int = 25
    patience: int = 10
    limit: int = 240


class Ended(NamedTuple):
    """What became of some processes.

    Attributes:
        codes: their exit codes, in order; negative for a signal.
        losses: of each step that process 0 has done.
        said: the line by which each process says why it ends.
        seconds: from the start to the end of all.
        after: seconds from the end of the first process to that of the last.
    """

    codes: list[int]
    losses: dict[int, float]
    said: list[str]
    seconds: float
    after: float


def run(config: Config, folder: Path, processes: int, killed: int = -1) -> Ended:
    """Train in so many processes, from the checkpoint in a folder if there is one.

    Args:
        config: the numbers.
        folder: for checkpoints and what the processes say.
        processes: how many.
        killed: the step after whose loss the last one dies; -1 for none.

    Returns:
        What became of them.

    Raises:
        TimeoutError: if they have not ended in time; they are stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}  # one device each
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (HERE, HERE.parent)))
    start, group, ends = time.monotonic(), [], {}
    logs = [folder / f"process{number}.log" for number in range(processes)]
    for number, log in enumerate(logs):
        asked = (json.dumps(asdict(config)), str(folder), address, str(processes), str(number), str(killed))
        script = "import sys; from several_processes import work; work(*sys.argv[1:])"
        command = [sys.executable, "-c", script, *asked]
        with log.open("w") as file:
            group.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    try:
        while len(ends) < processes:
            ends |= {n: time.monotonic() for n, each in enumerate(group) if n not in ends and each.poll() is not None}
            if time.monotonic() > start + config.limit:
                raise TimeoutError(f"{processes - len(ends)} of {processes} processes ran for {config.limit} seconds.")
            time.sleep(0.05)
    finally:
        for each in group:
            each.kill()
            each.wait()
    lines = (folder / "losses.txt").read_text().splitlines()
    losses = {int(step): float(loss) for step, loss in map(str.split, lines)}
    ends_with = (END.search(log.read_text()) for log in logs)
    said = [found[1] or found[2] if found else "" for found in ends_with]
    last, first = max(ends.values()), min(ends.values())
    return Ended([each.returncode for each in group], losses, said, last - start, last - first)


def work(settings: str, folder: str, address: str, processes: str, number: str, killed: str) -> None:
    """What one process does; it is asked by the words of its command."""
    config = Config(**json.loads(settings))
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        options = {"heartbeat_timeout_seconds": config.patience}
        jax.distributed.initialize(address, int(processes), int(number), **options)
        sync_global_devices("all are there")  # gloo waits for half a minute, and only here all have come as far
    last = jax.process_index() == jax.process_count() - 1
    for step, loss in train(config, Path(folder) / "state.npz"):
        if step == int(killed) and last:
            os.kill(os.getpid(), 9)
        if jax.process_index() == 0:
            with (Path(folder) / "losses.txt").open("a") as file:
                file.write(f"{step} {loss!r}\n")


def train(config: Config, checkpoint: Path) -> Iterator[tuple[int, float]]:
    """Train, and give the number and the loss of each step.

    Args:
        config: the numbers.
        checkpoint: where the state is kept, and taken from if it is there.

    Yields:
        Steps done before, and the loss of the batch.
    """
    model, data = Perceptron((config.units,) * config.hidden, 10), digits().train
    images, labels = np.asarray(data.images), np.asarray(data.labels)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    variables = model.init(jax.random.key(0), images[:1])
    capture = ng.linen.capture(model, LIKELIHOOD)
    layers = capture.layers(variables, images[: config.batch])
    tx = ng.kfac(0.1, layers, damping=0.03, statistics_every=2, refresh_every=5)
    tx = ng.sharding.share_refreshes(tx, mesh)

    @jax.jit
    def step(variables, state, x, y, key):
        out = capture.value_and_grad(variables, x, y, key=key)
        updates, state = tx.update(out.grad, state, variables["params"], curvature=out.curvature)
        return {"params": optax.apply_updates(variables["params"], updates)}, state, out.value

    def spread(rows: np.ndarray) -> jax.Array:  # which every process has; each keeps its part
        return jax.make_array_from_callback(rows.shape, apart, lambda part: rows[part])

    carry = jax.device_put((variables, tx.init(variables["params"])), everywhere)
    (leaves, rows), first = saved(checkpoint), 0
    if rows:
        first = rows[-1]["steps"]
        carry = jax.device_put(jax.tree.unflatten(jax.tree.structure(carry), leaves), everywhere)
    for number in range(first, config.steps):
        chosen = np.random.default_rng(number).choice(len(images), config.batch, replace=False)
        *carry, loss = step(*carry, spread(images[chosen]), spread(labels[chosen]), jax.random.key(number))
        yield number, float(loss)
        if (number + 1) % config.every == 0 and jax.process_index() == 0:
            save(checkpoint, jax.tree.leaves(jax.device_get(carry)), [{"steps": number + 1}])


def table(config: Config, runs: dict[str, Ended]) -> Table:
    """What became of every run."""
    rows = []
    for name, ended in runs.items():
        last, said = max(ended.losses), next(filter(None, ended.said), "")
        after = f"{ended.after:.1f} s" if any(ended.codes) else ""
        counts = " ".join(map(str, ended.codes)), f"{last + 1}", f"{ended.losses[last]:.6f}", f"{ended.seconds:.0f}"
        rows.append((name, *counts, after, said[:100]))
    headings = ("run", "exit codes", "steps done", "last loss", "seconds", "the others end after", "what they say")
    return figures.table(f"The digits, {config.steps} steps of K-FAC in batches of {config.batch}", headings, rows)


def story(config: Config, folder: Path) -> dict[str, Ended]:
    """One process; several; several of which one is killed; the same after a restart."""
    several = f"{config.processes} processes"
    return {
        "one process": run(config, folder / "one", 1),
        several: run(config, folder / "several", config.processes),
        f"{several}, one killed": run(config, folder / "again", config.processes, config.killed),
        "restarted": run(config, folder / "again", config.processes),
    }


def main(config: Config) -> None:
    """Run the story, print its table, and say whether it is as expected."""
    with tempfile.TemporaryDirectory() as folder:
        runs = story(config, Path(folder))
    Console(width=170).print(table(config, runs))
    one, several, _, again = runs.values()
    far = max(abs(one.losses[step] - several.losses[step]) for step in one.losses)
    say(f"Largest difference between one process and several in the loss of a step: {far:.1e}")
    say(f"The losses after the restart are exactly those undisturbed: {again.losses == several.losses}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
