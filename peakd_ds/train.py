"""From settings to an exported student: the whole program, read from top to bottom.

    deepspeed peakd_ds/train.py --task rte --teacher bert-base-uncased --run_dir runs/rte

A run has three stages (stages.py says what each trains, on what loss): the teacher is fine-tuned, the student is
pretrained with the teacher's predictions, the student is distilled. All go through the one loop below. The same command
started again goes on where it stopped; a stage that is over is not run again.
"""

import math
import sys
from pathlib import Path

from deepspeed import DeepSpeedEngine
from torch import nn

from peakd_ds import (
    checkpoint,
    data,
    dist,
    ds_engine,
    jit_lock,
    preempt,
    report,
    run_lock,
    slurm_job,
    stages,
    vocabulary,
)
from peakd_ds.checkpoint import TrainState
from peakd_ds.config import STAGES, RunConfig, UserError, exit_with, parse, to_yaml
from peakd_ds.kernels import choose_backend
from peakd_ds.modeling import has_unnamed_labels
from peakd_ds.run import Run, check_run_folder, open_run
from peakd_ds.run_log import RunLog, StepMeter
from peakd_ds.stages import Stage


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
    num_steps = epochs * len(data.epoch_slots(len(run.train_rows), config.global_batch_size, config.seed, 0))

    module = build(stage, config)
    vocabulary.trim(module, run.used_tokens)
    resumed_from, skipped = checkpoint.newest(folder)
    for warning in skipped:
        log.say(f"warning: {warning}")
    fresh = TrainState(tokens=vocabulary.digest(run.used_tokens))
    if resumed_from is not None:
        checkpoint.load_weights(module, resumed_from, fresh.tokens)
    engine = ds_engine.training_engine(module, config, run.student_ds_config, num_steps, stage.name)
    state = fresh if resumed_from is None else checkpoint.restore(engine, resumed_from)
    share_to_loss = ds_engine.undo_averaging(engine)
    log.start_stage(stage.name, num_steps, state.step, to_yaml(config))
    log.say(
        f"stage {stage.name}: {epochs} epochs, {num_steps} steps" + (f", from step {state.step}" if state.step else "")
    )

    meter = StepMeter(stage.name, run.teacher_clock)
    while state.epoch < epochs and not is_patience_over(config, state):
        slots = data.epoch_slots(len(run.train_rows), config.global_batch_size, config.seed, state.epoch)
        batches = data.global_batches(run.train, run.train_rows, slots, num_accum_steps, first=state.batch)
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
                ds_engine.stop_if_skipped(engine, stage.name, state.step)
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
        ds_engine.stop_if_skipped(engine, stage.name, state.step)
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
    stage.finish(best.to(dist.device()).eval())
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


def plan(run: Run) -> str:
    """What is about to run, with every derived number beside what it is derived from."""
    config = run.config
    micro, accum = run.micro_and_accum
    pairs = ", ".join(f"{i}:{j}" for i, j in run.pairs) or "none"
    placement, unnamed = [], []
    if config.data_placement == "sharded":
        placement = [f"rows of {data.NUM_SHARDS // dist.num_nodes()} shards on each of {dist.num_nodes()} nodes"]
    if run.teacher_source.is_classifier and not run.task.is_regression and has_unnamed_labels(run.teacher_source):
        unnamed = [f"warning: the teacher does not name its classes; taken for {', '.join(run.task.label_names)}"]
    return "\n".join(
        [
            f"task {run.task.name}, method {run.method}, seed {config.seed}, {config.dtype} on {dist.device().type}",
            f"rows: train {len(run.train_rows):,}, {run.selection[0]} {len(run.selection[2]):,} (picks epochs), "
            + ", ".join(f"{name} {len(split):,}" for name, split in run.dev.items()),
            f"batch: global {config.global_batch_size} = micro {micro} x accum {accum} x world {dist.world_size()}, "
            f"from {math.gcd(config.global_batch_size, data.NUM_SHARDS)} of {data.NUM_SHARDS} shards at a time",
            *placement,
            f"teacher: {run.teacher_source.path}, {run.teacher_source.config.num_hidden_layers} layers of "
            f"{run.teacher_source.config.hidden_size}, ZeRO stage {ds_engine.zero_stage(run.teacher_ds_config)}",
            f"student: {config.num_hidden_layers} stored layers run as {run.student_depth} of "
            f"{run.student_init.config.hidden_size}, ZeRO stage {ds_engine.zero_stage(run.student_ds_config)}, "
            f"layer pairs {pairs}",
            f"vocabulary: {len(run.used_tokens):,} of {len(run.tokenizer):,} tokens occur and are trained",
            f"loss: {loss_backend(config)}",
            *unnamed,
            *(f"warning: {jit_lock.describe(lock)}" for lock in jit_lock.stale_locks()),
        ]
    )


def loss_backend(config: RunConfig) -> str:
    """What computes the losses, and why."""
    if config.loss_backend != "auto":
        return f"{config.loss_backend} kernels (--loss_backend)"
    chosen, reason = choose_backend(dist.device().type)
    return f"{chosen} kernels, since {reason}"


def cli() -> None:
    """Console script, and what launchers start."""
    preempt.listen()
    try:
        with slurm_job.noted():
            main(parse(sys.argv[1:]))
    except (UserError, OSError) as error:  # OSError: a full disk or a folder that is gone, told without a traceback
        exit_with(error)


if __name__ == "__main__":
    cli()
