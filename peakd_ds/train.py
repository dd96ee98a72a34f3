"""From settings to an exported student: the whole program, read from top to bottom.

    deepspeed peakd_ds/train.py --task rte --teacher bert-base-uncased --run_dir runs/rte

A run has three stages (stages.py says what each trains, on what loss): the teacher is fine-tuned, the student is
pretrained with the teacher's predictions, the student is distilled. All go through the one loop below. The same command
started again goes on where it stopped; a stage that is over is not run again.
"""

if __name__ == "__main__":  # run as a file: options are checked before the imports below, which take seconds
    from functools import partial

    from peakd_ds import command_line
    from peakd_ds.ranks import notes, signals

    signals.listen()
    command_line.start("peakd_ds.train:run_rank", "train.py", on_refusal=partial(notes.note, "refused"))

import math
from pathlib import Path

from deepspeed import DeepSpeedEngine
from torch import nn

from peakd_ds import report, stages
from peakd_ds.cluster import run_lock
from peakd_ds.command_line import to_yaml
from peakd_ds.config import RunConfig
from peakd_ds.config.outputs import STAGES
from peakd_ds.data.batches import epoch_slots, global_batches
from peakd_ds.engine import checkpoint, engines
from peakd_ds.engine.checkpoint import TrainState
from peakd_ds.errors import UserError
from peakd_ds.model import vocabulary
from peakd_ds.ranks import dist, preempt, signals
from peakd_ds.ranks.device import device
from peakd_ds.ranks.outcome import noted
from peakd_ds.results.log import RunLog
from peakd_ds.results.meter import StepMeter
from peakd_ds.run import Run, check_run_folder, open_run, plan
from peakd_ds.stages import Stage


@noted()
def run_rank(config: RunConfig) -> None:
    """One rank of the program, from joining the others to leaving them."""
    main(config)


def main(config: RunConfig) -> None:
    """Run the chosen stages and report."""
    dist.init(config.rank_timeout)
    run = open_run(config)
    log = RunLog(run.folder)
    log.say(plan(run))
    if config.dry_run:
        return
    with run_lock.owned(run.folder):
        dist.on_main(lambda: check_run_folder(run.config))  # another start may have begun it in the meantime
        for name in STAGES:
            if name not in config.stages:
                continue
            reason = stages.skipped_because(name, run)
            if reason is not None:
                log.say(f"stage {name} is skipped: {reason}")
                continue
            train(stages.build_stage(name, run, log), run, log)
        report.write(run, log)


def train(stage: Stage, run: Run, log: RunLog) -> None:
    """Train one stage from its newest checkpoint, or its start, to the export of its best epoch."""
    config, folder = run.config, run.folder / "checkpoints" / stage.name
    epochs = config.epochs_of(stage.name)
    _, num_accum_steps = run.micro_and_accum
    num_steps = epochs * len(epoch_slots(len(run.train_rows), config.global_batch_size, config.seed, 0))

    module = build(stage, config)
    vocabulary.trim(module, run.used_tokens)
    resumed_from, skipped = checkpoint.newest(folder)
    for warning in skipped:
        log.say(f"warning: {warning}")
    fresh = TrainState(tokens=vocabulary.digest(run.used_tokens))
    if resumed_from is not None:
        checkpoint.load_weights(module, resumed_from, fresh.tokens)
    engine = engines.training_engine(module, config, run.student_ds_config, num_steps, stage.name)
    state = fresh if resumed_from is None else checkpoint.restore(engine, resumed_from)
    share_to_loss = engines.undo_averaging(engine)
    log.start_stage(stage.name, num_steps, state.step, to_yaml(config))
    log.say(
        f"stage {stage.name}: {epochs} epochs, {num_steps} steps" + (f", from step {state.step}" if state.step else "")
    )

    meter = StepMeter(stage.name, run.teacher_clock)
    while state.epoch < epochs and not is_patience_over(config, state):
        slots = epoch_slots(len(run.train_rows), config.global_batch_size, config.seed, state.epoch)
        batches = global_batches(run.train, run.train_rows, slots, num_accum_steps, first=state.batch)
        for batch in stage.answered(batches):
            dist.seed_everything(config.seed, stage.name, state.step, dist.rank())  # dropout masks
            is_logged = (state.step + 1) % config.log_steps == 0 or state.step == 0
            lr = engine.get_lr()[0]
            engine.train()
            meter.start_step()
            for micro in batch.micro_batches:
                loss, pair_distances = stage.loss(engine, micro, batch, is_logged)
                engine.backward(loss.total * share_to_loss)
                engine.step()  # updates weights after the last micro-batch of the global batch
                meter.add(loss, pair_distances, micro.inputs["input_ids"].numel())
            state.step += 1
            state.batch += 1
            state.decay *= 1 - lr * config.weight_decay if engine.was_step_applied() else 1
            meter.end_step(state.step, batch.num_items, batch.num_tokens)
            log.advance()

            stop = preempt.stop_agreed()  # a signal asks for it; at an epoch's end, that is saved first
            is_saved = config.save_steps > 0 and state.step % config.save_steps == 0
            is_saved = (is_saved or stop is not None) and state.batch < len(slots)
            is_evaluated = config.eval_steps > 0 and state.step % config.eval_steps == 0 and state.batch < len(slots)
            if is_logged or is_saved or is_evaluated:
                meter.stop_if_not_finite(folder)
                engines.stop_if_skipped(engine, stage.name, state.step)
                log.stop_if_failed()
            if is_logged:
                metrics, watched = meter.reduce()
                values = {**metrics, "lr": lr, "grad_norm": grad_norm(engine)}
                log.step(state.step, num_steps, state.epoch, values, watched)
                log.monitor(engine, values)
            if is_evaluated:
                evaluate(stage, engine, run, state, log)
            if is_saved:
                checkpoint.save(folder, engine, state)
                preempt.leave_if(stop)
            if is_logged or is_evaluated or is_saved:
                meter.restart_clock()

        meter.stop_if_not_finite(folder)
        engines.stop_if_skipped(engine, stage.name, state.step)
        state.epoch, state.batch = state.epoch + 1, 0
        score = evaluate(stage, engine, run, state, log)[stage.score]
        if state.best_score is None or (
            score > state.best_score if stage.higher_is_better else score < state.best_score
        ):
            state.best_score, state.best_epoch, state.epochs_without_better = score, state.epoch, 0
            checkpoint.save_best(folder, engine, state)
        else:
            state.epochs_without_better += 1
        checkpoint.save(folder, engine, state)
        preempt.leave_if(preempt.stop_agreed())
        meter.restart_clock()

    engine.destroy()
    best = load_best(stage, run, checkpoint.best_folder(folder, state.best_epoch))
    dist.on_main(run_lock.check)
    stage.finish(best.to(device()).eval())
    log.say(
        f"stage {stage.name} is over: {stage.score} {state.best_score:.4f} on {run.selection[0]} picks epoch "
        f"{state.best_epoch} of {state.epoch}"
    )
    log.end_stage()
    checkpoint.finish(
        folder,
        {
            "steps": state.step,
            "epochs": state.epoch,
            "best_epoch": state.best_epoch,
            "selected_on": run.selection[0],
            stage.score: state.best_score,
        },
    )


def build(stage: Stage, config: RunConfig) -> nn.Module:
    """The stage's module (collective); new weights (heads, projections) come from the seed, the same on every rank."""
    dist.seed_everything(config.seed, stage.name, "weights")
    return dist.agree(stage.build)


def load_best(stage: Stage, run: Run, folder: Path) -> nn.Module:
    """The stage's module with the weights of its best epoch, its embedding table whole again (collective)."""
    module = build(stage, run.config)
    whole_table = vocabulary.trim(module, run.used_tokens)
    checkpoint.load_weights(module, folder)
    decay = dist.on_main(lambda: checkpoint.state_of(folder).decay)
    vocabulary.restore(module, whole_table, run.used_tokens, decay)
    return module


def evaluate(stage: Stage, engine: DeepSpeedEngine, run: Run, state: TrainState, log: RunLog) -> dict[str, float]:
    """Metrics on the rows that pick the epoch (collective), logged."""
    engine.eval()
    try:
        metrics = stage.evaluate(engine)
    except ValueError as error:  # predictions that are NaN, on all ranks: a finite loss can have such a gradient
        raise UserError(f"{stage.name} step {state.step}: {error}") from error
    log.evaluation(state.step, state.epoch, run.selection[0], metrics)
    return dist.broadcast(metrics)  # processors of different kinds may round the last bit differently


def is_patience_over(config: RunConfig, state: TrainState) -> bool:
    """Whether early stopping ends the stage; the same on every rank, since scores are."""
    return 0 < config.early_stopping_patience <= state.epochs_without_better


def grad_norm(engine: DeepSpeedEngine) -> float | None:
    """Global gradient norm before clipping; None where fp16 has skipped the step, and in fp32 at stage 0."""
    norm = engine.get_global_grad_norm()
    return None if norm is None or not math.isfinite(norm) else float(norm)
