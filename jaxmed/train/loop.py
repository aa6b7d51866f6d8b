"""Training, from a config to a folder: `fit` is the recipe, in the order in which things happen.

Killed at any moment, the same call goes on: state from the newest complete checkpoint, data by step number, dropout by (seed,
step); metrics beyond that step are dropped and written again. The result is the undisturbed run's, bit for bit. Asked to end
(SIGTERM), all processes save at the same step and leave.
"""

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxmed.checkpoint.manager import FOLDER, Checkpoints
from jaxmed.checkpoint.sources import weights_identity
from jaxmed.config import Experiment, to_dict
from jaxmed.data.pipeline import batches, evaluation_batches
from jaxmed.data.plan import GlobalBatch
from jaxmed.distributed import is_first, say
from jaxmed.errors import Preempted, UserError
from jaxmed.preemption import Preemption, listening
from jaxmed.sharding import make_mesh, mesh_notices
from jaxmed.train.diagnose import explain_poison
from jaxmed.train.flops import peak_flops
from jaxmed.train.folder import Skipped, open_run
from jaxmed.train.hosts import check_hosts
from jaxmed.train.init import (
    Blueprint,
    abstract_state,
    blueprint,
    embeddings_of_base,
    first_state,
    flatten,
    frozen_half,
    start,
    unflatten,
)
from jaxmed.train.optim import make_optimizer, schedule
from jaxmed.train.sources import Sources, open_data
from jaxmed.train.statistics import token_statistics
from jaxmed.train.step import Metrics, make_eval_step, make_step
from jaxmed.train.tasks import Evaluated, task_of
from jaxmed.train.writer import Silent, Writer
from jaxmed.types import Batch, PairBatch, TrainState

UNBEGUN = "asked to end before a step was made; the same command goes on"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run came to."""

    steps: int
    loss: float
    """Of the last step; NaN where none was made now"""
    eval_loss: float
    """The last one; NaN without held-out records"""
    resumed_from: int
    compilations: int
    """Of the train step: one a bucket"""
    skipped: int


def fit(experiment: Experiment, out: str, devices: Sequence[jax.Device] | None = None) -> Summary:
    """Trains what the experiment describes in the folder `out`, or goes on where an earlier call stopped.

    `devices`: those of the mesh; all of the job by default.
    """
    check_hosts(experiment, out)
    open_run(out, experiment)
    mesh = make_mesh(experiment.mesh, devices)
    with jax.set_mesh(mesh), listening() as preemption:
        model = blueprint(experiment, mesh)
        for text in mesh_notices(experiment, dict(mesh.shape)):
            say(text)
        if not model.trainable:
            raise UserError("nothing would be trained; set lora.rank above 0, or train.trainable to projector or all")
        checkpoints = Checkpoints(out, experiment.train.keep)
        try:
            with preemption.nothing_to_lose(UNBEGUN):
                # resume priority: the newest complete checkpoint of this folder; else model.adapter over the base; else the
                # base; else from scratch
                found = checkpoints.restore(abstract_state(model), say)
                if found and found[1]["step"] == found[1]["total_steps"]:
                    checkpoints.close()
                    return already_finished(out, found[1]["step"])
                preemption.leave_if_reached(UNBEGUN)
                sources = open_data(experiment, out)
                total = sources.plan.total_steps(experiment.train)
                preemption.leave_if_reached(UNBEGUN)
                state, frozen = going_on(model, sources, *found, out) if found else fresh(model, sources)
                preemption.leave_if_reached(UNBEGUN)
            owed = bool(found and found[1].get("evaluation_owed"))
            summary = Run(model, sources, frozen, checkpoints, preemption, out, total, int(state.step)).train(state, owed)
        except Preempted:
            checkpoints.wait()
            checkpoints.close()
            raise
        except BaseException:
            if jax.process_count() == 1:  # among several, waiting for a save may be waiting for one that is dead
                checkpoints.abandon()
            raise
        checkpoints.wait()
        checkpoints.close()
    report(summary, out, total)
    return summary


def already_finished(out: str, steps: int) -> Summary:
    say(f"{out}: finished already, all {steps} steps are done; nothing to do")
    return Summary(steps, math.nan, math.nan, steps, 0, 0)


def going_on(model: Blueprint, sources: Sources, state: TrainState, meta: dict[str, Any], out: str) -> tuple[TrainState, Any]:
    """State and frozen half of a run that has a checkpoint; what it was trained with must be what there is now."""
    config = model.experiment.model
    if weights_identity(config) != meta["base_fingerprint"]:
        places = " and ".join(place for place in (config.base, config.tower_folder) if place) or "no base"
        raise UserError(f"{places}: other weights than those with which {out} was trained; put the old folder back")
    if sources.fingerprint != meta["data"]:
        raise UserError(f"{out}: the training records or the sizes of their token files have changed; use another --out")
    say(f"going on after step {meta['step']}")
    return state, frozen_half(model)


def fresh(model: Blueprint, sources: Sources) -> tuple[TrainState, Any]:
    """State and frozen half before the first step."""
    trainable, frozen = start(model)
    if model.experiment.model.adapter and not model.experiment.train.keep_embed_tokens:
        trainable = unflatten(flatten(trainable) | embeddings_of_base(model))
    if model.experiment.visual.norm and not model.experiment.model.adapter:
        say("computing the statistics of the visual input")
        for name, values in zip(("norm_mean", "norm_sd"), token_statistics(sources.train), strict=True):
            place = model.trainable["projector"][name].sharding
            trainable["projector"][name] = jax.make_array_from_callback(values.shape, place, values.__getitem__)
    return first_state(model, trainable), frozen


def report(summary: Summary, out: str, total: int) -> None:
    """The last lines of a run."""
    compiled = f"the step was compiled {summary.compilations} time{'s' if summary.compilations != 1 else ''}"
    say(f"done: {total} steps, checkpoint in {os.path.join(out, FOLDER, str(total))}; {compiled}")
    if summary.skipped:
        say(f"{left_out(summary.skipped)}; {os.path.join(out, 'skipped.jsonl')} says which and why")


def left_out(count: int) -> str:
    return f"{count} record{'s' if count != 1 else ''} left out"


@dataclasses.dataclass(frozen=True)
class Done:
    """A step whose metrics are not read yet."""

    step: int
    metrics: Metrics
    plan: GlobalBatch
    batch: Batch | PairBatch
    data_wait: float


class Run:
    """The steps of one call of `fit`."""

    def __init__(
        self,
        model: Blueprint,
        sources: Sources,
        frozen: Any,
        checkpoints: Checkpoints,
        preemption: Preemption,
        out: str,
        total: int,
        begin: int,
    ):
        self.model, self.experiment, self.sources, self.frozen = model, model.experiment, sources, frozen
        self.checkpoints, self.preemption, self.out = checkpoints, preemption, out
        self.total, self.begin = total, begin
        optimizer = make_optimizer(self.experiment.optim, total, model.trainable)
        self.task = task_of(model)
        self.step = make_step(self.task.objective, model.experiment, optimizer)
        self.eval_step = make_eval_step(self.task.objective)
        optim = self.experiment.optim
        # all rates at once: asking the device for one would wait for the step that it is busy with
        self.rates = np.asarray(schedule(optim, optim.learning_rate, total)(np.arange(total)))
        self.peak = peak_flops(jax.devices()[0]) * model.mesh.size
        self.meta = {
            "config": to_dict(self.experiment),
            "total_steps": total,
            "base": self.experiment.model.base,
            "base_fingerprint": weights_identity(self.model.experiment.model),
            "encoder": sources.train.encoder,
            "data": sources.fingerprint,
        }
        self.writer = Writer(out, begin, total) if is_first() else Silent()
        self.skipped = Skipped(out, sources.left_out, begin)
        if self.skipped.count:
            self.writer.say(f"{left_out(self.skipped.count)}: {self.skipped.path}")
        self.since, self.number = Window(), begin
        self.loss = self.eval_loss = math.nan

    def train(self, state: TrainState, owed: bool) -> Summary:
        """All steps from `begin` on; a step's metrics are read while the next one runs. `owed`: `begin` was not evaluated."""
        loader = batches(
            self.sources.train, self.sources.plan, self.begin, self.model.mesh, self.model.rules, self.total, self.leave_out
        )
        try:
            if owed and self.evaluate(self.begin, state):
                raise Preempted(UNBEGUN)
            self.since = Window()
            pending: Done | None = None
            for number in range(self.begin + 1, self.total + 1):
                self.number = number
                plan, batch = next(loader)
                state, metrics = self.step(state, self.frozen, batch)
                self.log(pending)
                pending = Done(number, metrics, plan, batch, loader.data_wait)
                stop = self.preemption.reached() and number < self.total
                train = self.experiment.train
                if stop or self.due(number, train.save_every) or self.due(number, train.eval_every):
                    # nothing is evaluated or saved before it is known to be sound
                    self.log(pending)
                    pending = None
                    self.boundary(number, state, stop)
            return Summary(self.total, self.loss, self.eval_loss, self.begin, self.step._cache_size(), self.skipped.count)
        finally:
            loader.close()
            self.skipped.close()
            self.writer.close()

    def due(self, number: int, every: int) -> bool:
        return number == self.total or (every > 0 and number % every == 0)

    def boundary(self, number: int, state: TrainState, stop: bool) -> None:
        """Evaluation before saving, so that a checkpoint has the rows of its step before it. `stop`: save and leave; there is
        no time to evaluate, who goes on does it first."""
        began = time.perf_counter()
        due = self.sources.held_out is not None and self.due(number, self.experiment.train.eval_every)
        if due and not stop:
            stop = self.evaluate(number, state)
            due = stop
        if stop or self.due(number, self.experiment.train.save_every):
            self.checkpoints.save(state, self.meta | {"step": number, "evaluation_owed": due})
        if stop:
            self.checkpoints.wait()
            raise Preempted(f"asked to end: step {number} of {self.total} is saved in {self.out}; the same command goes on")
        self.since.leave_out(time.perf_counter() - began)

    def log(self, done: Done | None) -> None:
        """Reads a step's metrics; stops the run if they are not numbers."""
        if done is None:
            return
        loss, norm = float(done.metrics.loss), float(done.metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(explain_poison(done.step, loss, done.metrics, done.plan, done.batch, self.sources.train))
        self.loss = loss
        sizes = [self.sources.train.samples[i].size for i in done.plan.samples]
        self.since.add(self.task.units(sizes), self.task.flops(sizes, done.metrics), done.data_wait)
        if not self.due(done.step, self.experiment.train.log_every):
            return
        window, self.since = self.since, Window()
        seconds = max(window.spent(), 1e-9)
        row = {
            "step": done.step,
            "loss": loss,
            "learning_rate": float(self.rates[done.step - 1]),
            "grad_norm": norm,
            self.task.speed: window.units / seconds,
            **self.task.row(done.metrics),
            "data_wait": window.data_wait,
            "seconds": seconds,
        }
        self.writer.step(row, {"mfu": window.flops / seconds / self.peak if self.peak else 0.0})

    def evaluate(self, number: int, state: TrainState) -> bool:
        """What the task measures on the held-out records, without dropout. -> whether to stop instead of it."""
        began = time.perf_counter()
        loader = evaluation_batches(self.sources.held_out, self.model.mesh, self.model.rules, self.leave_out)
        found = []
        stop = False
        for plan, batch in loader:
            found.append(Evaluated(plan, self.eval_step(state.trainable, self.frozen, batch)))
            stop = self.preemption.reached() and number < self.total
            if stop:
                break
        loader.close()
        if stop:
            return True
        row = self.task.evaluation(found, self.sources.held_out)
        self.eval_loss = row["eval_loss"]
        self.writer.evaluation({"step": number} | row | {"seconds": time.perf_counter() - began})
        return False

    def leave_out(self, problem: Any) -> None:
        """A sample whose files cannot be read, under --on-bad-record skip."""
        if self.skipped.add(problem, self.number):
            self.writer.say(f"left out: {problem}")


class Window:
    """What the steps since the last row of metrics add up to."""

    def __init__(self):
        self.units, self.flops, self.data_wait = 0, 0.0, 0.0
        self._began = time.perf_counter()

    def add(self, units: int, flops: float, data_wait: float) -> None:
        self.units += units
        self.flops += flops
        self.data_wait += data_wait

    def leave_out(self, seconds: float) -> None:
        """Time that went to evaluating and saving."""
        self._began += seconds

    def spent(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._began
