"""What a model is made of, without allocating it: `python -m tools.inspect_model --config=quickstart [--set model.dim=256]`

A line a weight: path, shape, logical axes, the axes summed over, role, sharding, size; then totals, FLOPs a token, and the
bytes of the parameters and of the decode state. `--chips=64 --set mesh.rules=fsdp` shows the sharding on so many chips.
`--list` shows the presets (`--json`: under `configs`).
"""

import jax
import jax.numpy as jnp
from absl import flags

from configs import PRESETS
from experiments import command_line
from research import sharding
from research.models.lm import LanguageModel
from research.schema import Config
from research.training.objectives import objective_named
from research.training.program import TRAINING_COST

command_line.define_config_flags()
command_line.define_json_flag()
flags.DEFINE_boolean("list", False, "List the presets and their sizes.")
flags.DEFINE_integer("chips", None, "Accelerators to lay the weights out on; default: those here.", lower_bound=1)
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS


def family(config: Config) -> str:
    """The mixers of a layer, in order and without repetition: Attention+GatedMlp."""
    names = [type(mixer).__name__ for stage in config.model.stages for mixer in stage.pattern]
    return "+".join(dict.fromkeys(names))


def summary(config: Config) -> dict:
    """Sizes of a preset, exact, from shapes alone."""
    model = LanguageModel(config.model, objective_named(config.train.objective).heads)
    counts = model.param_counts()
    return {"name": config.name, "family": family(config), "params": counts["total"], "active_params": counts["active"],
            "non_embedding_params": counts["non_embedding"],
            "flops_per_token": TRAINING_COST * model.flops_per_token(config.data.seq_len),
            "state_bytes_4096": model.state_bytes(4096)}


def weight_rows(config: Config, chips: int) -> list[dict]:
    """A row for each weight, with its sharding on `chips` accelerators.

    Raises:
      InputError: the mesh of the config can't be made of so many, or doesn't divide a weight.
    """
    model = LanguageModel(config.model, objective_named(config.train.objective).heads)
    sizes = sharding.mesh_shape(config.mesh, chips)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    specs = sharding.weight_specs(model.weights, mesh, sharding.rules_named(config.mesh.rules))
    itemsize = jnp.dtype(config.model.param_dtype).itemsize
    return [{"path": path, "shape": list(weight.shape), "axes": list(weight.axes), "inputs": list(weight.inputs),
             "role": weight.role, "stage": weight.stage, "sharding": str(specs[path]), "params": weight.size,
             "bytes": weight.size * itemsize} for path, weight in model.weights.items()]


def main(_: list[str]) -> int:
    if FLAGS.list:
        rows = [summary(make()) for make in PRESETS.values()]
        if FLAGS.json:
            command_line.print_json({"configs": rows})
        else:
            table = [["name", "family", "params", "active", "train FLOPs/token", "state bytes at 4096"]]
            table += [[r["name"], r["family"], f"{r['params']:,}", f"{r['active_params']:,}", f"{r['flops_per_token']:.3g}",
                       f"{r['state_bytes_4096']:,}"] for r in rows]
            command_line.print_table(table)
        return 0
    config, _ = command_line.configured()
    chips = FLAGS.chips or jax.device_count()
    weights, whole = weight_rows(config, chips), summary(config)
    axes = {axis: size for axis, size in sharding.mesh_shape(config.mesh, chips).items() if size > 1}
    params_bytes = sum(row["bytes"] for row in weights)
    whole |= {"params_bytes": params_bytes, "mesh": axes, "rules": config.mesh.rules}
    if FLAGS.json:
        command_line.print_json(whole | {"weights": weights})
        return 0
    command_line.print_table([["weight", "shape", "axes", "summed over", "role", "sharding", "params"]] + [
        [row["path"], "x".join(map(str, row["shape"])), " ".join(row["axes"]), " ".join(row["inputs"]), row["role"],
         row["sharding"].removeprefix("PartitionSpec").removeprefix("P"), f"{row['params']:,}"] for row in weights])
    print(f"\n{config.name}: {whole['family']}, {whole['params']:,} parameters ({whole['active_params']:,} active, "
          f"{whole['non_embedding_params']:,} non-embedding), {params_bytes:,} bytes\n"
          f"{whole['flops_per_token']:,.0f} training FLOPs a token at length {config.data.seq_len}; decode state of a sequence "
          f"of 4096: {whole['state_bytes_4096']:,} bytes\nmesh {axes or 'one device'}, rules {config.mesh.rules}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
