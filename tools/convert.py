"""Models of Hugging Face's transformers to runs and back: `python -m tools.convert --from=hf --input=DIR --output=RUN`

    python -m tools.convert --from=hf --input=DIR --output=RUN       # then: python -m tools.generate --workdir=RUN
    python -m tools.convert --from=rung --input=RUN --output=DIR     # then: AutoModelForCausalLM.from_pretrained(DIR)

DIR holds config.json, model.safetensors (or several files and their index) and, where there is one, tokenizer.json (or
tokenizer.model as Llama's, or vocab.json and merges.txt of GPT-2). What of config.json, generation_config.json and the
tokenizer's files isn't read here is kept in the run and goes back with it. A few
copies of one tensor are in memory at a time; of a run that was trained here, all layers of it, as its checkpoint has them
(research/interop/huggingface.py says what was measured). Float16 weights are computed in float32. Pickles (.bin, .pt) are
refused. `python -m experiments.train --init_from=RUN` goes on from an imported model.
"""

from absl import flags

from experiments import command_line
from research.errors import InputError
from research.interop.huggingface import SHARD_BYTES, export_model, import_model

command_line.define_json_flag()
flags.DEFINE_enum("from", None, ["hf", "rung"], "What --input is: a model of Hugging Face's or a run.")
flags.DEFINE_string("input", None, "The directory to read.")
flags.DEFINE_string("output", None, "The directory to make.")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Convert weights on import; default: as they are.")
flags.DEFINE_integer("step", None, "Which checkpoint to export; default: the latest.")
flags.DEFINE_integer("max_shard_bytes", SHARD_BYTES, "Export files of at most so many bytes.", lower_bound=1)
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS


def main(_: list[str]) -> int:
    for name in ("from", "input", "output"):
        if not FLAGS[name].value:
            raise InputError(f"--{name}", "is missing", "see --help")
    if FLAGS["from"].value == "hf":
        done = import_model(FLAGS.input, FLAGS.output, FLAGS.dtype)
    else:
        done = export_model(FLAGS.input, FLAGS.output, FLAGS.step, FLAGS.max_shard_bytes)
    if FLAGS.json:
        command_line.print_json(done)
    else:
        print(f"{FLAGS.output}: {done['family']}, {done['params']:,} parameters in {done['tensors']} tensors, "
              f"{'with' if done['tokenizer'] else 'without'} its tokenizer")
    return 0


if __name__ == "__main__":
    command_line.run(main)
