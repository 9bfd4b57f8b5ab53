"""What a run measures and leaves behind: evaluations, samples, the documents' losses, result.json."""

import json
from typing import Any, Mapping

import jax
import numpy as np
from absl import logging
from etils import epath

from research import hardware
from research.data.loader import evaluation_batches
from research.decoding.engine import Engine
from research.decoding.sampling import Sampling
from research.errors import InputError, Interrupted
from research.evaluation.perplexity import Evaluation, evaluate, flat_evaluations
from research.params import params_sha256
from research.scaling.prediction import score
from research.schema import SCHEMA_VERSION, evaluation_file
from research.training.averaging import averaged_steps, mean_of
from research.training.metrics import finite, run_name
from research.training.program import BATCH_FIELDS
from research.training.session import Session, as_first
from research.training.state import TrainState
from research.training.workdir import write_result, write_text

SAMPLE_TOKENS = 120


def evaluate_sets(session: Session, params: Any, number: int, suffix: str = "") -> dict[str, Evaluation]:
    """Every validation set, to the records (once a step), the log and the caller."""
    config, layout = session.program.config, session.program.layout
    rows = config.train.batch_size // config.train.microbatches
    results = {}

    def put(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        sharding = layout.batch(("batch", "length"))
        return {name: jax.make_array_from_callback(batch[name].shape, sharding, lambda i, a=batch[name]: a[i])
                for name in BATCH_FIELDS}

    with session.clock.measure("evaluating"):
        for name, set_rows in session.data.validation.items():
            batches = evaluation_batches(set_rows, rows)
            evaluation = evaluate(session.nll, params, batches, put, session.data.tokenizer.token_bytes_V)
            name, result = name + suffix, evaluation.summary
            results[name] = evaluation
            if session.recorder and (number, name) not in session.evaluated:
                session.recorder.evaluation(number, name, result, evaluation.loss_by_position)
            session.evaluated[number, name] = result["loss"], result["se"]
            logging.info("step %d  %s: loss %.4f +- %.4f nats/token, perplexity %.2f, %.4f bits/byte", number, name,
                         result["loss"], result["se"], result["perplexity"], result["bits_per_byte"])
    if results and session.prediction:
        show_prediction(session, number)
        watch_prediction(session, number, next(iter(results.values())).summary["loss"])
    return results


def show_prediction(session: Session, number: int) -> None:
    """The predicted band at this step: lines beside the held-out loss."""
    if session.prediction and session.recorder:
        for name in ("low", "value", "high"):
            session.recorder.scalar(number, f"prediction/{name}", session.prediction[name])


def watch_prediction(session: Session, number: int, loss: float) -> None:
    """Tells the ledger, once a launch, that the held-out loss leaves the band: below it at any time, above it at the end."""
    low, high = session.prediction["low"], session.prediction["high"]
    ends = number == session.program.config.train.steps
    if session.left_band or not (loss < low or (ends and not loss <= high)):
        return
    session.left_band = True
    reason = f"the held-out loss {loss:.4f} is outside the predicted {low:.4f} to {high:.4f}"
    session.note("alarm", number, reason=reason)
    logging.warning("step %d: %s", number, reason)


def sample_text(session: Session, params: Any, number: int) -> str:
    """A sample continued from `train.sample_prompt`, to TensorBoard and the caller."""
    config, tokenizer = session.program.config, session.data.tokenizer
    prompt = config.train.sample_prompt
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    new_tokens = min(SAMPLE_TOKENS, config.model.max_len - len(prompt_ids))
    if new_tokens < 1 or jax.process_count() > 1:
        return ""
    with session.clock.measure("evaluating"):
        engine = Engine(session.program.model, Sampling(temperature=0.7, top_p=0.95), tokenizer.eos_id)
        generated = engine.generate(params, [prompt_ids], new_tokens, jax.random.key(number))
    text = prompt + tokenizer.decode(generated.token_ids[0])
    if session.recorder:
        session.recorder.text(number, "sample", text)
    return text


def saturated(session: Session) -> bool:
    """Has the first set not improved beyond its standard error for `train.stop_after_flat` evaluations?"""
    config = session.program.config
    if not config.train.stop_after_flat:
        return False
    first = config.data.validation[0].name
    history = [figures for (_, name), figures in sorted(session.evaluated.items()) if name == first]
    return as_first(flat_evaluations(*zip(*history)) if history else 0) >= config.train.stop_after_flat


def finish(session: Session, state: TrainState, steps_done: int, trained: int) -> dict[str, Any]:
    """The last evaluation, the sample, and result.json, written last. `trained`: steps of this launch.

    Raises:
      Interrupted: the disk had no room for the last step.
    """
    config, program, clock = session.program.config, session.program, session.clock
    status = "finished" if steps_done == config.train.steps else "saturated"
    session.bar.close()
    measured = evaluate_sets(session, session.averaged(state), steps_done)
    text = sample_text(session, session.averaged(state), steps_done) if config.train.sample_every else ""
    with clock.measure("saving"):
        session.checkpointer.wait()
    session.note_checkpoints()
    if (last := session.checkpointer.latest_step()) != steps_done:
        raise Interrupted(f"the disk is full: the last step, {steps_done}, isn't saved; make room, and the same command goes "
                          f"on from {'the start' if last is None else f'step {last}'}")
    if config.train.average:
        measured |= evaluate_sets(session, _average(session), steps_done, "/average")
    evaluations = {name: evaluation.summary for name, evaluation in measured.items()}
    first = evaluations[config.data.validation[0].name] if config.data.validation else None
    tokens = steps_done * program.tokens_per_step
    here = trained * program.tokens_per_step / max(sum(map(clock.get, ("training", "repeated", "data_wait"))), 1e-9)
    result = {
        "schema": SCHEMA_VERSION, "status": status, "steps": steps_done, "samples": steps_done * config.train.batch_size,
        "tokens": tokens, "flops": tokens * program.flops_per_token, "params": program.model.param_counts(),
        "final_eval": evaluations, "final_eval_loss": first["loss"] if first else None,
        "final_eval_loss_se": first["se"] if first else None, "bits_per_byte": first["bits_per_byte"] if first else None,
        "tokens_per_second": here, "mfu": model_utilization(session, here),
        "goodput": {name: round(value, 3) for name, value in session.goodput.seconds().items()},
        "chip_seconds": session.goodput.chip_seconds(), **hardware_costs(session.goodput.chip_seconds()),
        "corpus_sha256": session.data.corpus_hash,
        "validation_sha256": {name: evaluation.sha256 for name, evaluation in measured.items()},
        "params_sha256": params_sha256(state.params), "sample": text,
        "prediction": score(session.prediction, first["loss"] if first else None) if session.prediction else None,
    }
    if session.recorder:
        final = {"train/final_eval_loss": first["loss"], "train/bits_per_byte": first["bits_per_byte"]} if first else {}
        session.recorder.hparams(config, run_name(config, session.launch.preset), final)
        for name, value in final.items():
            session.recorder.scalar(steps_done, name, value)
        session.recorder.flush()
        for name, evaluation in measured.items():
            write_documents(session.workdir, name, evaluation)
        write_result(session.workdir, result)
    if scored := result["prediction"]:
        session.note("scored", steps_done, **{name: scored[name] for name in ("error", "relative_error", "covered", "sha256")})
    session.note("finished", steps_done, reason=status, final_eval_loss=result["final_eval_loss"])
    return result


def write_documents(workdir: epath.Path, name: str, evaluation: Evaluation) -> None:
    """evaluation-SET.jsonl: a line {document, tokens, nll} for each document of the last evaluation."""
    rows = zip(evaluation.document_D.tolist(), evaluation.tokens_D.tolist(), evaluation.nll_D.tolist())
    lines = [json.dumps({"document": document, "tokens": int(tokens), "nll": finite(nll)}) for document, tokens, nll in rows]
    write_text(workdir / evaluation_file(name), "\n".join(lines) + "\n")


def _average(session: Session) -> Any:
    """The mean of the parameters of the last `train.average` checkpoints that were due."""
    config, checkpointer, shapes = session.program.config, session.checkpointer, session.program.abstract.params
    chosen = averaged_steps(checkpointer.good_steps(), config.checkpoint.every_steps, config.train.average)
    if len(chosen) < config.train.average:
        logging.warning("train.average: of %d checkpoints, %s are there", config.train.average, chosen)
    with session.clock.measure("restoring"):
        return mean_of(lambda step: checkpointer.restore_params(shapes, step), chosen)


def model_utilization(session: Session, tokens_per_second: float) -> float | None:
    """MFU (PaLM, appendix B): tokens/s x training FLOPs a token / peak FLOP/s of all devices; None without a peak."""
    if not session.peak_flops:
        return None
    return tokens_per_second * session.program.flops_per_token / session.peak_flops


def hardware_costs(chip_seconds: float) -> dict[str, Any]:
    """Money: the list price, down to 40% of it (spot); energy: from half to all of the rated power. None if not known."""
    try:
        chip = hardware.chip_of(jax.devices()[0])
    except InputError:
        return {"cost": None, "energy_kwh": None}
    price, power, hours = chip.price_per_hour, chip.power_watts, chip_seconds / 3600
    cost = {"value": price * hours, "low": 0.4 * price * hours, "high": price * hours} if price else None
    kilowatt_hours = hours * power / 1e3 if power else None
    energy = {"value": 0.75 * kilowatt_hours, "low": 0.5 * kilowatt_hours, "high": kilowatt_hours} if kilowatt_hours else None
    return {"cost": cost, "energy_kwh": energy}
