"""The trainer: what happens from a config to a run folder.

A run folder holds `config.yaml` (resolved), `tokenizer`, `metrics.jsonl`, `checkpoints/step-00000100/`, `tensorboard/`, plots,
`sample.txt`, and the traceback of a rank that failed. Starting again with the same `run.dir` goes on from the newest checkpoint.
Nothing is written before it is clear that the run can start.
"""

import contextlib
import errno
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist

from moe_train.checkpoint import dcp
from moe_train.checkpoint.examine import flat
from moe_train.checkpoint.manifest import read_manifest
from moe_train.checkpoint.rng import RNG_FILE, restore_rng, rng_state
from moe_train.checkpoint.saver import Saver
from moe_train.cli import dump, load_run
from moe_train.config import Config
from moe_train.data.loader import StepBatch
from moe_train.data.tokenizer import Tokenizer, load_tokenizer
from moe_train.engine.base import StepResult
from moe_train.engine.choose import make_engine
from moe_train.errors import UserError
from moe_train.evaluate import CONFIG_FILE, TOKENIZER_FILE
from moe_train.faults.guard import Guard
from moe_train.faults.stragglers import Stragglers
from moe_train.faults.watchdog import Watchdog
from moe_train.feed import Feed, Followed, Rows
from moe_train.files import LEFTOVER, cannot_write, write_atomically
from moe_train.flops import count_flops, matmul_rate
from moe_train.generate import Prompt, Sampling, cache_conflicts, generate, with_cache, without_cache
from moe_train.jobs import note_job
from moe_train.metrics import RunLog, Throughput, router_health
from moe_train.optim import learning_rate
from moe_train.parallel.mesh import World, start_world
from moe_train.parallel.watch import RankFailure, Watch
from moe_train.pretraining import pretraining, settle_vocabulary
from moe_train.startup import Startup
from moe_train.stop import SAVE_SIGNAL, Request, StopRequest, agreed
from moe_train.transfer import take_weights

log = logging.getLogger(__name__)

Task = Callable[[Config, World, Tokenizer], tuple[Config, Feed]]  # fills in what depends on the data, and opens it


def train(config: Config, name: str = "run", task: Task | None = None) -> Path:
    """Train `config` on the data of `task` (default: pretraining on corpora) to its last step and return the run folder.

    `name` is used where the config names no folder.
    """
    startup = Startup()
    signal.signal(SAVE_SIGNAL, signal.SIG_IGN)  # before the first step there is nothing to save, and it would end the process
    world = start_world(config)
    startup.mark("process group")
    config, tokenizer = settle_vocabulary(config)
    config, feed = (task or pretraining)(settle(config, name), world, tokenizer)
    if world.main:
        for leak in config.model.leaks():
            log.warning("not a causal model: %s", leak)
    startup.mark("data")
    folder = Path(str(config.run.dir))
    try:
        check_run(folder, config, tokenizer)
        trainer = Trainer(config, world, tokenizer, folder, feed)
        startup.mark("model")
        trainer.resume()
        startup.mark("checkpoint")
        _write_folder(folder, config, tokenizer)
        trainer.run(startup)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch has exceptions that are no Exception
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise cannot_write(folder, error) from error
        _keep_traceback(folder / f"error-rank{world.rank}.log")
        raise
    return folder


def settle(config: Config, name: str) -> Config:
    """Fill in the run folder, the same on every rank."""
    if config.run.dir is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        rule = "torchrun --max-restarts starts workers again, which have to find the run"
        raise UserError(f"run.dir=None: {rule}; name a folder, run.dir=runs/{name}")
    folder = [config.run.dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"]
    dist.broadcast_object_list(folder)
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": folder[0]})})


def check_run(folder: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Raise UserError where the run or checkpoint in `folder` has another tokenizer or model; one without a config has none."""
    if not (folder / CONFIG_FILE).exists():
        return
    own = folder / TOKENIZER_FILE  # first: its size is one of the model's
    if own.exists():
        check_tokenizer(load_tokenizer(own).fingerprint, folder, config, tokenizer)
    if differ := model_differences(folder / CONFIG_FILE, config):
        raise UserError(
            f"{folder} holds a run with another model ({CONFIG_FILE}: {'; '.join(differ)}); "
            "choose another run.dir, or give the same model"
        )


def check_tokenizer(fingerprint: str | None, folder: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Raise UserError unless `fingerprint`, that of the run or checkpoint in `folder`, is that of `tokenizer`."""
    if fingerprint != tokenizer.fingerprint:
        rule = f"not the one of {folder}, whose ids mean something else"
        raise UserError(f"data.tokenizer={config.data.tokenizer}: {rule}; give {folder / TOKENIZER_FILE}")


def model_differences(path: Path, config: Config) -> list[str]:
    """Keys of the model section in which the run of file `path` and `config` differ."""
    there, here = (flat({"model": run.model.model_dump()}) for run in (load_run(path), config))
    return [f"{key}={there.get(key)} there, {here.get(key)} here" for key in here | there if there.get(key) != here.get(key)]


def _write_folder(folder: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Make the run folder on rank 0, without what a killed run has left there. Every rank calls this."""

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(LEFTOVER):
            leftover.unlink()
        dcp.clean(folder / "checkpoints")
        write_atomically(folder / CONFIG_FILE, dump(config).encode())
        tokenizer.save(folder / TOKENIZER_FILE)

    try:
        dcp.on_main(write)
    except OSError as error:
        raise cannot_write(folder, error) from error


def _keep_traceback(path: Path) -> None:
    with contextlib.suppress(OSError):  # the error itself is what matters
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8")


class Trainer:
    """One run in progress."""

    def __init__(self, config: Config, world: World, tokenizer: Tokenizer, folder: Path, feed: Feed) -> None:
        self.config, self.world, self.tokenizer, self.folder = config, world, tokenizer, folder
        self.engine = make_engine(config, world)
        self.feed, self.loader = feed, feed.batches
        self.guard = Guard(config, world, folder, self.engine, self._own_files, self._fault)
        self.stragglers = Stragglers(world, config.faults.straggler_factor)
        self.start = 0
        self.resumed = ""  # from where, for people
        self.log: RunLog | None = None

    def resume(self) -> None:
        """Go on from the newest checkpoint of the run folder, where there is one."""
        found = dcp.checkpoints(self.folder / "checkpoints")
        if not found:
            self._start_from(self.config.checkpoint.init_from)
            return
        path, steps = found[-1], self.config.train.steps
        state = read_manifest(path)
        self.start = state["step"]
        check_tokenizer(state.get("tokenizer"), path, self.config, self.tokenizer)
        check_run(path, self.config, self.tokenizer)
        if self.start > steps:
            raise UserError(f"train.steps={steps}: {path} is beyond that; raise train.steps, or choose another run.dir")
        self.loader.load_state_dict(state.get("loader"))
        tensors = self.engine.state_dict() | dcp.room(state, "memory", self.engine.keeps)
        dcp.load(path, tensors)
        self.engine.load_state_dict(tensors)
        self.engine.steps_done = self.start
        if "faults" in state:
            self.guard.load_state_dict(state["faults"])
        anew = "" if restore_rng(path, self.world.device) else "; torch's generators start anew on other ranks or devices"
        if self.config.train.memory and "memory" not in tensors:
            anew += f"; train.memory={self.config.train.memory} starts with none, which the checkpoint does not hold"
        self.resumed = f"resumed at step {self.start} from {path}{anew}"

    def _start_from(self, source: str | None) -> None:
        """Take over the weights of a checkpoint, and nothing else of it."""
        if source is None:
            return
        path = dcp.find(Path(source))
        check_tokenizer(read_manifest(path).get("tokenizer"), path, self.config, self.tokenizer)
        but = take_weights(self.engine.model, path)
        self.resumed = f"starts from the weights of {path}"
        if differ := model_differences(path / CONFIG_FILE, self.config):
            self.resumed += f", whose model differs in what is no weight: {'; '.join(differ)}"
        self.resumed += but

    def run(self, startup: Startup) -> None:
        """Train from where the run stands to its last step; then test, sample and draw."""
        config, steps = self.config, self.config.train.steps
        rate = matmul_rate(self.world.device, self.world.dtype)
        throughput = Throughput(count_flops(config.model, config.train.seq_len), rate.flops * self.world.size)
        with contextlib.ExitStack() as stack:
            if self.world.main:
                self.log = stack.enter_context(RunLog(self.folder, steps, self.start, monitor=config.monitor))
            self._say(
                f"run {self.folder}: {self.world.reason}; MFU against {rate.source}, {rate.flops / 1e12:.3g} TFLOP/s a rank"
            )
            if self.resumed:
                self._say(self.resumed)
            if self.world.main and (job := note_job(self.folder, self.start)):
                self._say(job)
            startup.mark("log")
            self._say(startup.describe())
            stop = stack.enter_context(StopRequest())
            saver = stack.enter_context(self._saver())
            watch = stack.enter_context(Watch(self.world, config.parallel.timeout_seconds))
            hang = config.faults.hang_seconds or config.parallel.timeout_seconds / 2
            watchdog = stack.enter_context(Watchdog(self.folder, self.world, watch, hang))
            stack.callback(self.stragglers.close)
            for step in range(self.start + 1, steps + 1):
                watch.step = step
                asked = self._step(step, throughput, stop)
                stopping = asked is Request.STOP
                watchdog.alive()
                with throughput.pause():
                    if config.eval.every and step % config.eval.every == 0 and step < steps:
                        self._evaluate(step, "valid", self.feed.validation, watchdog)
                    last = stopping or step == steps
                    due = config.checkpoint.every and step % config.checkpoint.every == 0 and not self.guard.skipped
                    if last or due or asked is Request.SAVE:
                        self._save(saver, step, last)
                    elif saver.done:
                        self._settle(saver)
                    if asked is Request.SAVE and not last:
                        self._say(f"saving step {step}, as a signal asks")
                watchdog.alive()
                if stopping and step < steps:
                    self._say(f"stopped by {stop.name or 'a signal to another rank'} at step {step}; the same command goes on")
                    return
            self._finish(steps, throughput, watchdog)

    def _step(self, step: int, throughput: Throughput, stop: StopRequest) -> Request:
        """Train one step; what the ranks were asked until its gradients were there."""
        with self.stragglers:
            batch = self.loader.next_step()
            result, norm, asked = self._compute(step, batch, stop)
        throughput.step(batch.token_count)
        train = self.config.train
        logged = step % train.log_every == 0 or step in (1, train.steps)
        ranks = self.stragglers.row() if logged else {}
        if self.log is None:
            return asked
        if not logged:
            self.log.tick(step)
            return asked
        row = {
            "loss": result.loss,
            "cross_entropy": result.cross_entropy,
            "grad_norm": norm,
            "lr": learning_rate(self.config.optim, step, train.steps),
        }
        row |= {"skipped": 1} if self.guard.skipped else {}
        self.log.train(step, row | throughput.row() | ranks | router_health(result.stats, batch.token_count))
        if complaint := self.stragglers.complaint(ranks):
            self._say(complaint)
        return asked

    def _compute(self, step: int, batch: StepBatch, stop: StopRequest) -> tuple[StepResult, float, Request]:
        """Gradients and, where they are accepted, the update; a second time, where the first may have been a device's fault."""
        asked = Request.NOTHING
        while True:
            result = self.engine.forward_backward(batch, votes=stop.votes)
            asked = max(asked, agreed(result.votes))
            norm = self.engine.step(partial(self.guard.accepts, step, batch, result))
            if not self.guard.again:
                return result, norm, asked
            self.engine.steps_done = step - 1

    def _evaluate(self, step: int, split: str, rows: Rows | None, watchdog: Watchdog) -> None:
        if rows is None:
            return
        figures = self.feed.judge(self.engine, Followed(rows, watchdog.alive))
        if self.log is not None:
            self.log.evaluation(step, split, figures)

    def _saver(self) -> Saver:
        checkpoint = self.config.checkpoint
        return Saver(
            self.folder / "checkpoints",
            asynchronous=checkpoint.asynchronous,
            last=checkpoint.keep_last,
            every=checkpoint.keep_every,
            device=self.world.device,
            timeout_seconds=self.config.parallel.timeout_seconds,
            lost=RankFailure,
        )

    def _save(self, saver: Saver, step: int, last: bool) -> None:
        """Begin a checkpoint; finish it, if it is the `last` one, which nothing can follow and which must not fail."""
        self._settle(saver)
        if self.log is not None:
            self.log.sync()  # a checkpoint presumes the rows up to its step
        files = {RNG_FILE: rng_state(self.world.device)} | (self._own_files() if self.world.main else {})
        state = {
            "loader": self.loader.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "tokenizer": self.tokenizer.fingerprint,
            "faults": self.guard.state_dict(),
        }
        saver.start(step, self.engine.state_dict(), state, files, self.engine.logical_state())
        if last and (refused := saver.wait()) is not None:
            raise refused

    def _settle(self, saver: Saver) -> None:
        """Wait for the save in flight. Where the disk has refused it, training goes on until the last one."""
        if (refused := saver.wait()) is not None:
            self._say(f"warning: {refused}; training goes on, and the next checkpoint is tried as usual")

    def _finish(self, step: int, throughput: Throughput, watchdog: Watchdog) -> None:
        for split, rows in self.feed.splits.items():
            self._evaluate(step, split, rows, watchdog)
        sample = self.config.sample
        if sample.max_tokens:
            model, device = self.engine.model, self.world.device
            cached = not cache_conflicts(self.config)
            predict = with_cache(model.decode, device) if cached else without_cache(model.logits, device)
            prompt, sampling = Prompt(sample.prompt, self.config.run.seed), Sampling(sample.max_tokens, sample.temperature)
            text = generate(predict, self.tokenizer, [prompt], sampling, self.config.train.seq_len)[0].text
            model.reshard()
            if self.world.main:
                (self.folder / "sample.txt").write_text(sample.prompt + text, encoding="utf-8")
            self._say(f"sample:\n{sample.prompt}{text}")
        if self.world.main:
            from moe_train import plots  # imported here because matplotlib takes long, and the first step would wait for it

            plots.draw(self.folder, self._say)
        speed = throughput.average()
        if speed:
            self._say(
                f"{speed['tokens_per_second']:.0f} tokens/s, MFU {speed['mfu']:.1%} (causal), {speed['mfu_full']:.1%} (full)"
            )
        self._say(f"done: {self.folder}")
        dist.barrier()

    def _own_files(self) -> dict[str, bytes]:
        """What a checkpoint has of the run folder."""
        return {name: (self.folder / name).read_bytes() for name in (CONFIG_FILE, TOKENIZER_FILE)}

    def _fault(self, step: int, row: dict[str, object]) -> None:
        if self.log is not None:
            self.log.fault(step, row)

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log.say(text)
