"""What does K-FAC cost on several devices, by the policy of its state, beside Adam?

Eight scanned layers between two others, trained on 1, 2, 4 and 8 simulated devices. Nothing is timed: flops, bytes sent
and bytes held are those of one device, read from the compiled programs of a step at which nothing is due, of the
statistics, of the refresh, and of a step of Adam. At last the mean step with statistics every 10 and refreshes every
100 steps, over Adam's.

Expected: with shared refreshes a device has its part of the flops; with the state cut by layer a refresh sends nothing,
and a step the direction. Statistics send as much as the gradient, so that they are what remains.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import natgrad_jax as ng
from experiments.programs import Program

POLICIES = ("replicated", "replicated, shared", "layer, shared", "factor")


@dataclass(frozen=True)
class Config:
    """The numbers of all programs.

    Attributes:
        devices: how many, one after another.
        units: of the scanned layers.
        depth: how many of them.
        ends: inputs and outputs of the net.
        batch: examples of all devices.
        statistics_every: steps between statistics, of the mean step.
        refresh_every: steps between refreshes, of the mean step.
    """

    devices: tuple[int, ...] = (1, 2, 4, 8)
    units: int = 64
    depth: int = 8
    ends: int = 16
    batch: int = 128
    statistics_every: int = 10
    refresh_every: int = 100


def apply(params, x):
    """The net."""
    h = jnp.tanh(x @ params["first"])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["deep"])
    return h @ params["last"]


def directions(layers: ng.Layers) -> dict[str, Any]:
    """The methods that can be measured, with none of their work in a step that is not due for it."""
    rare: dict[str, Any] = {"damping": 0.1, "refresh_every": 100}
    return {
        "kfac": partial(ng.scale_by_kfac, layers, early_refresh=False, **rare),
        "ekfac": partial(ng.scale_by_ekfac, layers, early_refresh=False, **rare),
        "shampoo": partial(ng.scale_by_shampoo, layers, early_refresh=False, **rare),
        "soap": partial(ng.scale_by_soap, layers, statistics_every=10, **rare),
        "tengrad": partial(ng.scale_by_tengrad, layers, **rare),
    }


def measure(config: Config, policies: tuple[str, ...] = POLICIES, method: str = "kfac") -> list[dict[str, Any]]:
    """Flops, bytes sent and bytes held on one of the devices that there are, for Adam and every policy of a method."""
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, apart = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    shapes = {"first": (config.ends, config.units), "deep": (config.depth, config.units, config.units)}
    params = {name: jnp.ones(shape) for name, shape in (shapes | {"last": (config.units, config.ends)}).items()}
    x = y = jnp.ones((config.batch, config.ends))
    watched = ng.capture(apply, ng.losses.squared_error)
    ours = directions(watched.layers(params, x))[method]()
    tensors = method in ("shampoo", "soap")
    (params, x, y) = jax.device_put(params, everywhere), *jax.device_put((x, y), apart)
    key = jax.random.key(0)

    def programs(tx, shardings, watched=watched):
        """The step, and what is due at times."""

        def step(params, state, x, y, key):
            out = watched.value_and_grad(params, x, y, key=key)
            updates, state = tx.update(out.grad, state, params, curvature=out.curvature)
            return optax.apply_updates(params, updates), state

        def evidence(params, x, y, key):
            return params if tensors else watched.value_and_grad(params, x, y, key=key).curvature

        def observed(state, params, x, y, key):
            return ng.observe(tx, state, evidence(params, x, y, key), params=params)

        def refreshed(state, params, x, y, key):
            given = None if method in ("kfac", "shampoo") else evidence(params, x, y, key)
            return ng.refresh(tx, state, given, params=params)

        state = jax.device_put(tx.init(params), shardings)
        places = jax.tree.map(lambda _: everywhere, params), shardings

        def compiled(function, out, *given, dearest=True):
            program = jax.jit(function, out_shardings=out).lower(*given).compile()
            memory: Any = program.memory_analysis()
            return Program(program.as_text() or "", count, dearest), memory.argument_size_in_bytes

        found = {"step": compiled(step, places, params, state, x, y, key, dearest=False)}
        if tx is not adam:
            found["observe"] = compiled(observed, shardings, state, params, x, y, key)
            usual = method != "tengrad"  # a kernel that rounding makes indefinite is dearer, and rare
            found["refresh"] = compiled(refreshed, shardings, state, params, x, y, key, dearest=usual)
        return found, ng.sharding.bytes_per_device(state)

    def told(name, found, held):
        numbers = {
            what: {
                "flops": each.flops(),
                "bytes": each.bytes_sent(),
                "sent": [[one.what, one.shape, one.times] for one in each.sent()],
                "arguments": arguments,
            }
            for what, (each, arguments) in found.items()
        }
        return {"devices": count, "policy": name, "state": held, **numbers}

    adam = optax.adam(0.1)
    rows = [told("Adam", *programs(adam, jax.tree.map(lambda _: everywhere, jax.eval_shape(adam.init, params))))]
    for name in policies:
        policy, shared = cast(Any, name.split(", ")[0]), "shared" in name
        tx = ng.sharding.share_refreshes(ours, mesh, policy) if shared else ours
        capture = ng.sharding.share_gradients(watched, mesh) if name == "layer, shared" else watched
        rows.append(told(name, *programs(tx, ng.sharding.state_specs(ours, params, mesh, policy), capture)))
    return rows


def run(config: Config) -> list[dict[str, Any]]:
    """What `measure` finds in a process for each number of devices."""
    rows = []
    for count in config.devices:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        command = [sys.executable, "-c", "from experiments.sharded import worker; worker()", json.dumps(asdict(config))]
        done = subprocess.run(
            command, env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"The process of {count} devices failed:\n{done.stderr.decode()}")
        rows += json.loads(done.stdout.splitlines()[-1])
    return rows


def worker() -> None:
    """The process of one number of devices."""
    print(json.dumps(measure(Config(**json.loads(sys.argv[1])))))


def mean_step(row: dict[str, Any], adam: dict[str, Any], config: Config, what: str) -> float:
    """Flops or bytes of a mean step over Adam's."""
    more = row["observe"][what] / config.statistics_every + row["refresh"][what] / config.refresh_every
    return (row["step"][what] + more) / adam["step"][what] if adam["step"][what] else float("nan")


def table(rows: list[dict[str, Any]], config: Config) -> Table:
    """One row for each number of devices and policy."""
    result = Table(title=f"One device: {config.depth} scanned layers of {config.units}, batches of {config.batch}")
    heads = ("devices", "policy", "state kB", "refresh Mflop", "sent kB", "statistics sent kB", "step sent kB")
    for head in (*heads, "flops over Adam", "sent over Adam"):
        result.add_column(head, justify="left" if head == "policy" else "right")
    adams = {row["devices"]: row for row in rows if row["policy"] == "Adam"}
    for row in rows:
        adam, kilo = adams[row["devices"]], [f"{row['state'] / 1e3:.0f}"]
        if row is adam:
            cells = [*kilo, "", "", "", f"{row['step']['bytes'] / 1e3:.0f}", "1", "1"]
        else:
            parts = [row["refresh"]["flops"] / 1e6, *(row[w]["bytes"] / 1e3 for w in ("refresh", "observe", "step"))]
            over = [mean_step(row, adam, config, what) for what in ("flops", "bytes")]
            cells = [*kilo, *(f"{part:.0f}" for part in parts), *("" if x != x else f"{x:.2f}" for x in over)]
        result.add_row(str(row["devices"]), row["policy"], *cells)
    return result


def main(config: Config) -> None:
    """Compile everything, and print the table."""
    console = Console(width=max(Console().width, 130))
    with console.status("compiling"):
        rows = run(config)
    console.print(table(rows, config))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
