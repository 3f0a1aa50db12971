"""The trainer: what happens from a config to a run folder.

A run folder holds `config.yaml` (resolved), `tokenizer`, `metrics.jsonl`, `checkpoints/step-00000100/`, `tensorboard/`, plots,
`sample.txt`, and the traceback of a rank that failed. Starting again with the same `run.dir` goes on from the newest checkpoint.
"""

import contextlib
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from moe_train import plots
from moe_train.checkpoint import dcp
from moe_train.cli import dump, load_run
from moe_train.config import Config
from moe_train.data.corpus import build_default_corpus
from moe_train.data.loader import EvalRows, Loader
from moe_train.data.tokenizer import Tokenizer, load_tokenizer
from moe_train.engine.native import NativeEngine
from moe_train.errors import UserError
from moe_train.evaluate import CONFIG_FILE, TOKENIZER_FILE, byte_lengths, report
from moe_train.flops import count_flops, matmul_rate
from moe_train.generate import generate
from moe_train.metrics import RunLog, Throughput, router_health
from moe_train.optim import learning_rate
from moe_train.parallel.mesh import World, start_world
from moe_train.stop import StopRequest

DEFAULT_CORPUS = Path("data/stdlib")
VOCAB_MULTIPLE = 64


def train(config: Config, name: str = "run") -> Path:
    """Train `config` to its last step and return the run folder. `name` is used where the config names no folder."""
    world = start_world(config)
    config, tokenizer = settle_vocabulary(config)
    config = settle(config, world, name)
    folder = Path(str(config.run.dir))
    if world.main:
        _prepare_folder(folder, config, tokenizer)
    dist.barrier()
    try:
        trainer = Trainer(config, world, tokenizer, folder)
        trainer.resume()
        trainer.run()
    except UserError:
        raise
    except Exception:
        (folder / f"error-rank{world.rank}.log").write_text(traceback.format_exc(), encoding="utf-8")
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
    vocab = config.model.vocab_size or -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if vocab < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab}: smaller than the {tokenizer.vocab_size} ids of tokenizer {config.data.tokenizer}; "
            "raise it, or leave it out"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab})}), tokenizer


def data_loader(config: Config, world: World, tokenizer: Tokenizer) -> Loader:
    """This rank's training batches."""
    assert config.data.train is not None  # settle() fills it in
    return Loader(
        config.data.train,
        seq_len=config.train.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        seed=config.run.seed,
        dp_rank=world.rank,
        dp_size=world.size,
        vocab_size=config.model.vocab_size,
        tokenizer=tokenizer,
    )


def _prepare_folder(folder: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Make the run folder, or check that what is in it is this run."""
    path = folder / CONFIG_FILE
    if path.exists():
        before = load_run(path)
        if before.model != config.model:
            raise UserError(
                f"run.dir={folder}: holds a run with another model (see {path}); choose another run.dir, or give the same model"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(config), encoding="utf-8")
    tokenizer.save(folder / TOKENIZER_FILE)


class Trainer:
    """One run in progress."""

    def __init__(self, config: Config, world: World, tokenizer: Tokenizer, folder: Path) -> None:
        self.config, self.world, self.tokenizer, self.folder = config, world, tokenizer, folder
        self.engine = NativeEngine(config, world)
        self.lengths = byte_lengths(tokenizer)
        self.loader = data_loader(config, world, tokenizer)
        self.start = 0
        self.log: RunLog | None = None

    def resume(self) -> None:
        """Go on from the newest checkpoint of the run folder, where there is one."""
        found = dcp.checkpoints(self.folder / "checkpoints")
        if not found:
            return
        tensors = self.engine.state_dict()
        state = dcp.load(found[-1], tensors)
        self.engine.load_state_dict(tensors)
        self.engine.steps_done = self.start = state["step"]
        self.loader.load_state_dict(state["loader"])

    def run(self) -> None:
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
            if self.start:
                self._say(f"resumed at step {self.start}")
            stop = stack.enter_context(StopRequest(self.world))
            for step in range(self.start + 1, steps + 1):
                self._step(step, throughput)
                stopping = stop.agreed()
                with throughput.pause():
                    if config.eval.every and step % config.eval.every == 0 and step < steps:
                        self._evaluate(step, "valid", config.eval.max_rows)
                    if stopping or step == steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
                        self._save(step)
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

    def _evaluate(self, step: int, split: str, max_rows: int | None) -> None:
        config = self.config
        rows = EvalRows(
            getattr(config.data, split),
            seq_len=config.train.seq_len,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=self.world.rank,
            dp_size=self.world.size,
            max_rows=max_rows,
            vocab_size=config.model.vocab_size,
            tokenizer=self.tokenizer,
        )
        figures = report(self.engine.evaluate(rows, self.lengths))
        if self.log is not None:
            self.log.evaluation(step, split, figures)

    def _save(self, step: int) -> None:
        if self.log is not None:
            self.log.sync()  # a checkpoint presumes the rows up to its step
        folder = self.folder / "checkpoints"
        files = {name: (self.folder / name).read_bytes() for name in (CONFIG_FILE, TOKENIZER_FILE)}
        dcp.save(folder, step, self.engine.state_dict(), {"loader": self.loader.state_dict()}, files)
        if self.world.main:
            dcp.keep(folder, self.config.checkpoint.keep_last, self.config.checkpoint.keep_every)
        dist.barrier()

    def _finish(self, step: int, throughput: Throughput) -> None:
        self._evaluate(step, "valid", None)
        self._evaluate(step, "test", None)
        sample = self.config.sample
        if sample.max_tokens:
            text = generate(
                self.engine.model,
                self.tokenizer,
                sample.prompt,
                max_tokens=sample.max_tokens,
                temperature=sample.temperature,
                seed=self.config.run.seed,
                window=self.config.train.seq_len,
                device=self.world.device,
            )
            if self.world.main:
                (self.folder / "sample.txt").write_text(sample.prompt + text, encoding="utf-8")
            self._say(f"sample:\n{sample.prompt}{text}")
        if self.world.main:
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
