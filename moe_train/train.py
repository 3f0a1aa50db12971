"""The trainer: what happens from a config to a run folder.

A run folder holds `config.yaml` (resolved), `tokenizer`, `metrics.jsonl`, `checkpoints/step-00000100/`, `tensorboard/`, plots,
`sample.txt`, and the traceback of a rank that failed. Starting again with the same `run.dir` goes on from the newest checkpoint.
Nothing is written before it is clear that the run can start.
"""

import contextlib
import errno
import logging
import math
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from moe_train.checkpoint import dcp
from moe_train.checkpoint.examine import flat
from moe_train.checkpoint.manifest import read_manifest
from moe_train.checkpoint.rng import RNG_FILE, restore_rng, rng_state
from moe_train.checkpoint.saver import Saver
from moe_train.cli import dump, load_run
from moe_train.config import Config
from moe_train.data.corpus import build_default_corpus
from moe_train.data.loader import EvalRows, Loader
from moe_train.data.tokenizer import Tokenizer, load_tokenizer
from moe_train.engine.native import NativeEngine
from moe_train.errors import UserError
from moe_train.evaluate import CONFIG_FILE, TOKENIZER_FILE, byte_lengths, report
from moe_train.files import cannot_write, write_atomically
from moe_train.flops import count_flops, matmul_rate
from moe_train.generate import Prompt, Sampling, cache_conflicts, generate, with_cache, without_cache
from moe_train.metrics import RunLog, Throughput, router_health
from moe_train.optim import learning_rate
from moe_train.parallel.mesh import World, data_place, start_world
from moe_train.parallel.watch import RankFailure, Watch
from moe_train.startup import Startup
from moe_train.stop import StopRequest

DEFAULT_CORPUS = Path("data/stdlib")
VOCAB_MULTIPLE = 64

log = logging.getLogger(__name__)


def train(config: Config, name: str = "run") -> Path:
    """Train `config` to its last step and return the run folder. `name` is used where the config names no folder."""
    startup = Startup()
    world = start_world(config)
    startup.mark("process group")
    config, tokenizer = settle_vocabulary(config)
    config = settle(config, world, name)
    if world.main:
        for leak in config.model.leaks():
            log.warning("not a causal model: %s", leak)
    startup.mark("data")
    folder = Path(str(config.run.dir))
    try:
        check_model(folder / CONFIG_FILE, config)
        trainer = Trainer(config, world, tokenizer, folder)
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


def settle(config: Config, world: World, name: str) -> Config:
    """Fill in what depends on the machine: run folder and default corpus. The same on every rank."""
    folder = [config.run.dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"]
    dist.broadcast_object_list(folder)
    data = config.data
    if None in (data.train, data.valid, data.test):
        if world.main:
            build_default_corpus(DEFAULT_CORPUS, config.data.tokenizer)
        dist.barrier()
        prefixes = build_default_corpus(DEFAULT_CORPUS, config.data.tokenizer)
        splits = {split: getattr(data, split) or str(prefixes[split]) for split in ("train", "valid", "test")}
        data = data.model_copy(update=splits)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": folder[0]}),
            "data": data,
        }
    )


def settle_vocabulary(config: Config) -> tuple[Config, Tokenizer]:
    """The config with `model.vocab_size` set, and the tokenizer. A size that is given may be larger than the tokenizer's."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    multiple = math.lcm(VOCAB_MULTIPLE, config.parallel.tp)
    vocab = config.model.vocab_size or -(-tokenizer.vocab_size // multiple) * multiple
    if vocab < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab}: smaller than the {tokenizer.vocab_size} ids of tokenizer {config.data.tokenizer}; "
            "raise it, or leave it out"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab})}), tokenizer


def data_loader(config: Config, world: World, tokenizer: Tokenizer) -> Loader:
    """This rank's training batches."""
    assert config.data.train is not None  # settle() fills it in
    rank, size = data_place(config.parallel, world)
    return Loader(
        config.data.train,
        seq_len=config.train.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        seed=config.run.seed,
        dp_rank=rank,
        dp_size=size,
        vocab_size=config.model.vocab_size,
        tokenizer=tokenizer,
        weights=config.data.weights,
        contiguous=config.data.order == "contiguous",
    )


def eval_rows(config: Config, world: World, tokenizer: Tokenizer, split: str, max_rows: int | None = None) -> EvalRows:
    """This rank's rows of `valid` or `test`."""
    rank, size = data_place(config.parallel, world)
    return EvalRows(
        getattr(config.data, split),
        seq_len=config.train.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=rank,
        dp_size=size,
        max_rows=max_rows,
        vocab_size=config.model.vocab_size,
        tokenizer=tokenizer,
        contiguous=config.data.order == "contiguous",
    )


def check_model(path: Path, config: Config) -> None:
    """Raise UserError where the run of file `path` has another model than `config`; a file that is not there has none."""
    if not path.exists():
        return
    if differ := model_differences(path, config):
        raise UserError(
            f"{path.parent} holds a run with another model ({path.name}: {'; '.join(differ)}); "
            "choose another run.dir, or give the same model"
        )


def model_differences(path: Path, config: Config) -> list[str]:
    """Keys of the model section in which the run of file `path` and `config` differ."""
    there, here = (flat({"model": run.model.model_dump()}) for run in (load_run(path), config))
    return [f"{key}={there.get(key)} there, {here.get(key)} here" for key in here | there if there.get(key) != here.get(key)]


def _write_folder(folder: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Make the run folder on rank 0, without what a killed run has left there. Every rank calls this."""

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
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

    def __init__(self, config: Config, world: World, tokenizer: Tokenizer, folder: Path) -> None:
        self.config, self.world, self.tokenizer, self.folder = config, world, tokenizer, folder
        self.engine = NativeEngine(config, world)
        self.logical_state = self.engine.logical_state()
        self.lengths = byte_lengths(tokenizer)
        self.loader = data_loader(config, world, tokenizer)
        self.validation = eval_rows(config, world, tokenizer, "valid", config.eval.max_rows)
        self.whole_splits = {split: eval_rows(config, world, tokenizer, split) for split in ("valid", "test")}
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
        self.start = read_manifest(path)["step"]
        check_model(path / CONFIG_FILE, self.config)
        if self.start > steps:
            raise UserError(f"train.steps={steps}: {path} is beyond that; raise train.steps, or choose another run.dir")
        tensors = self.engine.state_dict()
        state = dcp.load(path, tensors)
        if state.get("tokenizer") != self.tokenizer.fingerprint:
            raise UserError(
                f"data.tokenizer={self.config.data.tokenizer}: not the one that {path} was trained with; give that one"
            )
        self.loader.load_state_dict(state.get("loader"))
        self.engine.load_state_dict(tensors)
        self.engine.steps_done = self.start
        anew = "" if restore_rng(path, self.world.device) else "; torch's generators start anew on other ranks or devices"
        self.resumed = f"resumed at step {self.start} from {path}{anew}"

    def _start_from(self, source: str | None) -> None:
        """Take over the weights of a checkpoint, and nothing else of it."""
        if source is None:
            return
        path = dcp.find(Path(source))
        tensors = {"model": self.engine.model.state_dict()}
        state = dcp.load(path, tensors)
        if state.get("tokenizer") != self.tokenizer.fingerprint:
            rule = f"not the one of {path}, whose ids mean something else"
            remedy = f"give {path / TOKENIZER_FILE}"
            raise UserError(f"data.tokenizer={self.config.data.tokenizer}: {rule}; {remedy}")
        self.engine.model.load_state_dict(tensors["model"])
        self.resumed = f"starts from the weights of {path}"
        if differ := model_differences(path / CONFIG_FILE, self.config):
            self.resumed += f", whose model differs in what is no weight: {'; '.join(differ)}"

    def run(self, startup: Startup) -> None:
        """Train from where the run stands to its last step; then test, sample and draw."""
        config, steps = self.config, self.config.train.steps
        rate = matmul_rate(self.world.device, self.world.dtype)
        throughput = Throughput(count_flops(config.model, config.train.seq_len), rate.flops * self.world.size)
        with contextlib.ExitStack() as stack:
            if self.world.main:
                self.log = stack.enter_context(RunLog(self.folder, steps, self.start))
            self._say(
                f"run {self.folder}: {self.world.reason}; MFU against {rate.source}, {rate.flops / 1e12:.3g} TFLOP/s a rank"
            )
            if self.resumed:
                self._say(self.resumed)
            startup.mark("log")
            self._say(startup.describe())
            stop = stack.enter_context(StopRequest(self.world))
            saver = stack.enter_context(self._saver())
            watch = stack.enter_context(Watch(self.world, config.parallel.timeout_seconds))
            for step in range(self.start + 1, steps + 1):
                watch.step = step
                self._step(step, throughput)
                stopping = stop.agreed()
                with throughput.pause():
                    if config.eval.every and step % config.eval.every == 0 and step < steps:
                        self._evaluate(step, "valid", self.validation)
                    last = stopping or step == steps
                    if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
                        self._save(saver, step, last)
                    elif saver.done:
                        self._settle(saver)
                if stopping and step < steps:
                    self._say(f"stopped by {stop.name or 'a signal to another rank'} at step {step}; the same command goes on")
                    return
            self._finish(steps, throughput)

    def _step(self, step: int, throughput: Throughput) -> None:
        batch = self.loader.next_step()
        result = self.engine.forward_backward(batch)
        norm = self.engine.step()
        throughput.step(batch.token_count)
        if self.log is None:
            return
        train = self.config.train
        if step % train.log_every and step not in (1, train.steps):
            self.log.tick(step)
            return
        row = {
            "loss": result.loss,
            "cross_entropy": result.cross_entropy,
            "grad_norm": norm,
            "lr": learning_rate(self.config.optim, step, train.steps),
        }
        self.log.train(step, row | throughput.row() | router_health(result.stats, batch.token_count))

    def _evaluate(self, step: int, split: str, rows: EvalRows) -> None:
        figures = report(self.engine.evaluate(rows, self.lengths))
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
        files = {RNG_FILE: rng_state(self.world.device)}
        if self.world.main:
            files |= {name: (self.folder / name).read_bytes() for name in (CONFIG_FILE, TOKENIZER_FILE)}
        state = {
            "loader": self.loader.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "tokenizer": self.tokenizer.fingerprint,
        }
        saver.start(step, self.engine.state_dict(), state, files, self.logical_state)
        if last and (refused := saver.wait()) is not None:
            raise refused

    def _settle(self, saver: Saver) -> None:
        """Wait for the save in flight. Where the disk has refused it, training goes on until the last one."""
        if (refused := saver.wait()) is not None:
            self._say(f"warning: {refused}; training goes on, and the next checkpoint is tried as usual")

    def _finish(self, step: int, throughput: Throughput) -> None:
        for split, rows in self.whole_splits.items():
            self._evaluate(step, split, rows)
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

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log.say(text)
