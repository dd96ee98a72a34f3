"""From settings to an exported student: the whole program, read from top to bottom.

    deepspeed peakd_ds/train.py --task rte --teacher bert-base-uncased --run_dir runs/rte

A run has three stages: the teacher is fine-tuned, the student is pretrained with the teacher's predictions, the student
is distilled. stages.py says what each trains, on which loss; all three go through the loop below. Started again, the
same command continues from the newest checkpoint and skips finished stages.
"""

if __name__ == "__main__":  # run as a file: options are checked before the imports below, which take seconds
    from functools import partial

    from peakd_ds import command_line
    from peakd_ds.ranks import notes, signals

    signals.listen()
    command_line.start("peakd_ds.train:run_rank", "train.py", on_refusal=partial(notes.note, "refused"))

from pathlib import Path

from deepspeed import DeepSpeedEngine

from peakd_ds import report, stages
from peakd_ds.cluster import run_folder, run_lock
from peakd_ds.command_line import to_yaml
from peakd_ds.config import RunConfig
from peakd_ds.data.batches import GlobalBatch, global_batches
from peakd_ds.engine import checkpoint, engines
from peakd_ds.engine.checkpoint import TrainState
from peakd_ds.engine.schedule import Schedule
from peakd_ds.errors import UserError
from peakd_ds.plan import forecast, plan
from peakd_ds.ranks import dist, preempt
from peakd_ds.ranks.outcome import noted
from peakd_ds.results import finished
from peakd_ds.results.log import RunLog
from peakd_ds.results.meter import StepMeter
from peakd_ds.run import Run, open_run
from peakd_ds.stages import Stage


@noted()
def run_rank(config: RunConfig) -> None:
    """One rank of the program, from joining the others to leaving them."""
    main(config)


def main(config: RunConfig) -> None:
    """Open the run, train its stages and report."""
    dist.init(config.rank_timeout)
    where = dist.on_main(lambda: finished.say_if_finished(config))
    if where is not None:
        RunLog(Path(config.run_dir)).say(where)
        return
    run = open_run(config)
    log = RunLog(run.folder)
    log.say(plan(run))
    if config.dry_run:
        return
    with run_lock.owned(run.folder), log:
        dist.on_main(lambda: run_folder.check(run.config))  # another start may have written there meanwhile
        names = list(stages.names_to_run(run, log.say))
        log.forecast = forecast(run, names)
        for name in names:
            train(stages.build_stage(name, run, log), run, log)
        report.write(run, log)


def train(stage: Stage, run: Run, log: RunLog) -> None:
    """Train one stage, from its newest checkpoint or its start to the export of its best epoch."""
    config, folder = run.config, run.checkpoint_folder(stage.name)
    split, rows = run.train_of(stage.name), run.rows_of(stage.name)
    schedule = Schedule.of(config, stage.name, rows)
    module, tokens = stages.trainable_module(stage, run)
    engine, state = checkpoint.resume(
        folder, module, tokens, config, run.student_ds_config, schedule.num_steps, log.say
    )
    log.start_stage(stage, schedule.num_epochs, schedule.num_steps, state.step, to_yaml(config))
    meter = StepMeter(stage.name, run.teacher.clock)

    while not schedule.is_over(state):
        slots = rows.slots(config.global_batch_size, config.seed, state.epoch)
        batches = global_batches(split, rows.rows, slots, run.num_accum_steps, first=state.batch)
        for batch in stage.with_teacher_outputs(batches):
            dist.seed_everything(config.seed, stage.name, state.step, dist.rank())  # dropout masks
            lr, is_logged = engine.get_lr()[0], schedule.is_logged(state.step + 1)
            train_step(stage, engine, batch, meter, with_distances=is_logged)
            state.add_step(engine.was_step_applied(), lr * config.weight_decay)
            meter.end_step(state.step, batch.num_items, batch.num_tokens)
            log.advance()

            stop = preempt.stop_agreed()  # a signal on any rank; at the end of an epoch, the epoch is saved first
            due = schedule.due(state, is_stopping=stop is not None)
            if due.anything:
                stop_if_broken(meter, engine, log, folder, state)
            if due.log:
                log.step(state.step, schedule.num_steps, state.epoch, meter.reduce(), lr, engine)
            if due.evaluate:
                evaluate(stage, engine, run, state, log)
            if due.save:
                checkpoint.save(folder, engine, state)
                preempt.leave_if(stop)
            if due.anything:
                meter.restart_clock()
        stop_if_broken(meter, engine, log, folder, state)
        end_epoch(stage, engine, run, state, log)
        meter.restart_clock()

    engine.destroy()
    stage.finish(stages.load_best(stage, run, state.best_epoch))
    log.end_stage(stage.score, state, run.selection.name)
    checkpoint.finish(folder, state, stage.score, run.selection.name)


def train_step(
    stage: Stage, engine: DeepSpeedEngine, batch: GlobalBatch, meter: StepMeter, with_distances: bool
) -> None:
    """One optimizer step: forward pass, loss, backward pass and step, for each micro-batch of a global batch."""
    engine.train()
    meter.start_step()
    for micro in batch.micro_batches:
        loss, distances = stage.loss(engine, micro, batch, with_distances)
        engine.backward(loss.total * engines.undo_averaging(engine))
        engine.step()  # updates weights after the last micro-batch of the global batch
        meter.add(loss, distances, micro.num_positions)


def end_epoch(stage: Stage, engine: DeepSpeedEngine, run: Run, state: TrainState, log: RunLog) -> None:
    """Score the epoch, keep its weights if they are the best so far, and save a checkpoint (collective)."""
    folder = run.checkpoint_folder(stage.name)
    state.epoch, state.batch = state.epoch + 1, 0
    score = evaluate(stage, engine, run, state, log)[stage.score]
    if state.is_best(score, stage.higher_is_better):
        checkpoint.save_best(folder, engine, state)
    checkpoint.save(folder, engine, state)
    preempt.leave_if(preempt.stop_agreed())


def evaluate(stage: Stage, engine: DeepSpeedEngine, run: Run, state: TrainState, log: RunLog) -> dict[str, float]:
    """Metrics on the rows that pick the epoch (collective), logged."""
    engine.eval()
    try:
        metrics = stage.evaluate(engine)
    except ValueError as error:  # NaN predictions, on all ranks: a finite loss can have a gradient that is not
        raise UserError(f"{stage.name} step {state.step}: {error}") from error
    log.evaluation(state.step, state.epoch, run.selection.name, metrics)
    return dist.broadcast(metrics)  # processors of different kinds may round the last bit differently


def stop_if_broken(meter: StepMeter, engine: DeepSpeedEngine, log: RunLog, folder: Path, state: TrainState) -> None:
    """Raise UserError on every rank if a loss or gradient was not finite, or the log cannot be written (collective)."""
    meter.stop_if_not_finite(folder)
    engines.stop_if_skipped(engine, meter.stage, state.step)
    log.stop_if_failed()
