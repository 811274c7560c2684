"""What does K-FAC cost on several devices, by the policy of its state, beside Adam?

Eight scanned layers between two others, trained on 1, 2, 4 and 8 simulated devices. Nothing is timed: flops, bytes sent
and bytes held are those of one device, read from the compiled programs of a step at which nothing is due, of the
statistics, of the refresh, and of a step of Adam. At last the mean step with statistics every 10 and refreshes every
100 steps, over Adam's.

Expected: with shared refreshes a device has its part of the flops; with the state cut by layer a refresh sends nothing,
and a step the direction. Statistics send as much as the gradient, so that they are what remains.
"""

import json
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from collectives import Program
from devices import on_devices
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import track
from rich.table import Table

import natgrad_jax as ng
from experiments import figures

STATISTICS_EVERY, REFRESH_EVERY = 10, 100
"""Of the mean step."""
POLICIES = ("replicated", "replicated, shared", "layer, shared", "factor")


class Config(NamedTuple):
    """Units and depth of the scanned layers, inputs and outputs of the net, and the examples of all devices."""

    units: int = 64
    depth: int = 8
    ends: int = 16
    batch: int = 128


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

    def row(name, found, held):
        numbers = {
            what: {"flops": each.flops(), "bytes": each.bytes_sent(), "arguments": arguments}
            for what, (each, arguments) in found.items()
        }
        return {"devices": count, "policy": name, "state": held, **numbers}

    adam = optax.adam(0.1)
    rows = [row("Adam", *programs(adam, jax.tree.map(lambda _: everywhere, jax.eval_shape(adam.init, params))))]
    for name in policies:
        policy, shared = cast(Any, name.split(", ")[0]), "shared" in name
        tx = ng.sharding.share_refreshes(ours, mesh, policy) if shared else ours
        capture = ng.sharding.share_gradients(watched, mesh) if name == "layer, shared" else watched
        rows.append(row(name, *programs(tx, ng.sharding.state_specs(ours, params, mesh, policy), capture)))
    return rows


def mean_step(row: dict[str, Any], adam: dict[str, Any], what: str) -> float:
    """Flops or bytes of a mean step over Adam's."""
    more = row["observe"][what] / STATISTICS_EVERY + row["refresh"][what] / REFRESH_EVERY
    return (row["step"][what] + more) / adam["step"][what] if adam["step"][what] else float("nan")


def table(rows: list[dict[str, Any]]) -> Table:
    """One row for each number of devices and policy."""
    adams, lines = {row["devices"]: row for row in rows if row["policy"] == "Adam"}, []
    for row in rows:
        adam = adams[row["devices"]]
        if row is adam:
            cells = ["", "", "", f"{row['step']['bytes'] / 1e3:.0f}", "1", "1"]
        else:
            parts = [row["refresh"]["flops"] / 1e6, *(row[w]["bytes"] / 1e3 for w in ("refresh", "observe", "step"))]
            over = [mean_step(row, adam, what) for what in ("flops", "bytes")]
            cells = [*(f"{part:.0f}" for part in parts), *("" if x != x else f"{x:.2f}" for x in over)]
        lines.append((f"{row['devices']}", row["policy"], f"{row['state'] / 1e3:.0f}", *cells))
    headings = ("devices", "policy", "state kB", "refresh Mflop", "sent kB", "statistics sent kB", "step sent kB")
    sizes = Config()
    title = f"One device: {sizes.depth} scanned layers of {sizes.units}, batches of {sizes.batch}"
    return figures.table(title, (*headings, "flops over Adam", "sent over Adam"), lines, names=2)


def main() -> None:
    """Compile everything, and print the table."""
    script = "import json; from sharded import *; print(json.dumps(measure(Config())))"
    rows = [row for count in track((1, 2, 4, 8), "compiling") for row in json.loads(on_devices(count, script))]
    Console(width=170).print(table(rows))


if __name__ == "__main__":
    main()
