"""Continues prompts with a trained model: `python -m tools.generate --workdir=RUN --prompt="def " --max_new_tokens=40 --seed=0`

One prefill over the prompt, then jitted steps. `--temperature=0` is greedy. `--prompt_ids=5,17,3` gives token ids as they
are (several prompts: repeat --prompt). `--json` prints token_ids, logprobs (of the model itself, at temperature 1) and text.
"""

import jax
from absl import flags
from etils import epath

from experiments import command_line
from research.data.tokenizer import load_tokenizer
from research.decoding.engine import Engine
from research.decoding.sampling import Sampling
from research.errors import InputError
from research.interop.kept import end_ids
from research.models.lm import LanguageModel
from research.schema import TOKENIZER
from research.training.restore import load_params
from research.training.workdir import read_config

command_line.define_json_flag()
flags.DEFINE_string("workdir", None, "The run whose checkpoint generates.")
flags.DEFINE_multi_string("prompt", [], "Text to continue; repeat it for a batch.")
flags.DEFINE_multi_string("prompt_ids", [], "Token ids to continue instead, e.g. 5,17,3; nothing is put in front.")
flags.DEFINE_integer("max_new_tokens", 100, "Stop after so many new tokens.", lower_bound=1)
flags.DEFINE_float("temperature", 0.8, "0 is greedy.", lower_bound=0.0)
flags.DEFINE_integer("top_k", 0, "Sample among the k most likely; 0 = all.", lower_bound=0)
flags.DEFINE_float("top_p", 1.0, "Sample in the nucleus of this mass; 1 = all.", lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", lower_bound=0)
flags.DEFINE_integer("step", None, "Which checkpoint; default: the latest.")
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS


def main(_: list[str]) -> int:
    if not FLAGS.workdir:
        raise InputError("--workdir", "is missing", "name a run directory")
    if bool(FLAGS.prompt) == bool(FLAGS.prompt_ids):
        raise InputError("--prompt", "give either --prompt or --prompt_ids", 'e.g. --prompt="def "')
    config = read_config(FLAGS.workdir)
    if config.model.encoder_stages:
        raise InputError("--workdir", "holds an encoder-decoder, which continues no prompt", "name a decoder's run")
    # An imported model given by ids may come without a tokenizer; text needs one.
    directory = epath.Path(FLAGS.workdir).expanduser() / TOKENIZER
    tokenizer = load_tokenizer(str(directory)) if FLAGS.prompt or directory.exists() else None
    prompts = [parse_ids(text) for text in FLAGS.prompt_ids] or [
        [*tokenizer.begins, *tokenizer.encode(text).tolist()] for text in FLAGS.prompt]
    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
    params, step = load_params(FLAGS.workdir, step=FLAGS.step)
    ends = {*end_ids(FLAGS.workdir, config), *([tokenizer.eos_id] if tokenizer else [])}
    engine = Engine(LanguageModel(config.model), sampling, tuple(sorted(ends)))
    generated = engine.generate(params, prompts, FLAGS.max_new_tokens, jax.random.key(FLAGS.seed))
    texts = [tokenizer.decode(ids) if tokenizer else None for ids in generated.token_ids]
    if FLAGS.json:
        command_line.print_json({
            "step": step, "prompt_ids": prompts, "token_ids": generated.token_ids, "logprobs": generated.logprobs,
            "text": texts} if len(prompts) > 1 else {
            "step": step, "prompt_ids": prompts[0], "token_ids": generated.token_ids[0],
            "logprobs": generated.logprobs[0], "text": texts[0]})
        return 0
    for index, text in enumerate(texts):
        shown = text if text is not None else " ".join(map(str, generated.token_ids[index]))
        print((FLAGS.prompt[index] if FLAGS.prompt else "") + shown)
    return 0


def parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError("--prompt_ids", f"{text!r} is not a list of whole numbers", "e.g. --prompt_ids=5,17,3") from None


if __name__ == "__main__":
    command_line.run(main)
