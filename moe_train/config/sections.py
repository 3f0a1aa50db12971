"""The sections that are lists of keys: run, data, train, optim, engine, kernels, checkpoint, eval and sample."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from moe_train.config.base import Conflict, PathText, Probability, Section


class RunSection(Section):
    """Where the run lives and what makes it reproducible."""

    dir: PathText | None = None
    """run folder; default runs/<config>-<time>; a folder that holds a run is resumed"""
    seed: NonNegativeInt = 0
    """seed of initialisation, data order and sampling"""


class DataSection(Section):
    """Prepared corpora: prefixes of .bin/.idx pairs, as `launch/prepare_data.py` or Megatron-LM write them."""

    train: PathText | list[PathText] | None = None
    """training prefixes or patterns of them (data/web-*); default: the corpus made from Python's standard library, under data/stdlib"""
    weights: list[PositiveFloat] | None = None
    """shares of the entries of train in the rows, blended; null = all entries are one corpus. They may change at a resume"""
    order: Literal["shuffled", "contiguous"] = "shuffled"
    """contiguous: each row of a batch continues the same row of the batch before, as Transformer-XL trains"""
    valid: PathText | list[PathText] | None = None
    """validation prefixes; default as for train"""
    test: PathText | list[PathText] | None = None
    """prefixes evaluated once at the end of training; default as for train"""
    tokenizer: PathText = "bytes"
    """`bytes`, or the path of a SentencePiece model, a tokenizer.json or a vocabulary: what the corpora were prepared with"""
    mask_documents: bool = True
    """attention stays inside a document when a row packs several"""

    def conflicts(self) -> list[Conflict]:
        """Rules of a blend."""
        if self.weights is None:
            return []
        found = []
        entries = len(self.train) if isinstance(self.train, list) else int(self.train is not None)
        if len(self.weights) != entries:
            rule = f"must be one number for each of the {entries} entries of data.train"
            found.append(Conflict("data.weights", self.weights, rule, "change one of the two"))
        if self.order == "contiguous":
            rule = "rows of a blend (data.weights) cannot continue each other"
            found.append(Conflict("data.order", self.order, rule, "use shuffled, or leave out data.weights"))
        return found


class TrainSection(Section):
    """How much is trained, in which shapes and with which numbers."""

    steps: PositiveInt = 1000
    """optimizer steps"""
    global_batch_size: PositiveInt = 16
    """rows of an optimizer step, over all ranks"""
    micro_batch_size: PositiveInt = 16
    """rows of one forward pass of one data-parallel rank"""
    seq_len: PositiveInt = 256
    """tokens of a row"""
    memory: NonNegativeInt = 0
    """hidden rows of each layer that a row sees of the rows before it in its stream, in training and evaluation (Transformer-XL);
    needs model.block transformer_xl and data.order contiguous; 0 = none"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one"""
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """compute dtype; auto: bf16 on CUDA, fp32 on CPU. Master weights, router and optimizer are fp32 either way; fp64 (all of them, with
    the torch or reference backend) is for proofs that a layout changes nothing"""
    recompute: Literal["none", "selective", "full"] = "none"
    """activations that backward computes again instead of keeping: selective = experts and dense MLPs, full = attention too;
    routing is always kept"""
    compile: bool = False
    """torch.compile each block: minutes at the start, faster steps on a GPU"""
    log_every: PositiveInt = 10
    """steps between lines of metrics"""


class OptimSection(Section):
    """AdamW, its schedule and gradient clipping."""

    lr: PositiveFloat = 3e-3
    """peak learning rate"""
    min_lr: NonNegativeFloat | None = None
    """learning rate at the last step; default a tenth of lr"""
    warmup_steps: NonNegativeInt | None = None
    """steps of linear warm-up from 0; cosine decay follows; default 100, or what warmup_ratio says"""
    warmup_ratio: Probability | None = None
    """the warm-up as a share of all steps, instead of warmup_steps"""
    beta1: Probability = 0.9
    """decay of the first moment"""
    beta2: Probability = 0.95
    """decay of the second moment"""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon"""
    weight_decay: NonNegativeFloat = 0.1
    """decay of matrices; norms, biases and embeddings are not decayed"""
    clip_norm: PositiveFloat | None = 1.0
    """largest global gradient norm; null = no clipping"""

    @property
    def last_lr(self) -> float:
        """Learning rate at the last step."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps`."""
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * steps)
        return 100 if self.warmup_steps is None else self.warmup_steps

    def conflicts(self) -> list[Conflict]:
        """Rules of the schedule."""
        found = []
        if self.last_lr > self.lr:
            found.append(
                Conflict("optim.min_lr", self.min_lr, f"must be at most optim.lr={self.lr}", "lower it, or leave it out")
            )
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            rule = f"optim.warmup_steps={self.warmup_steps} says how long the warm-up is, too"
            found.append(Conflict("optim.warmup_ratio", self.warmup_ratio, rule, "set one of the two to null"))
        return found


class EngineSection(Section):
    """Which engine runs the step."""

    name: Literal["native", "deepspeed"] = "native"
    """native: FSDP2; deepspeed: DeepSpeed's ZeRO, for data and expert parallelism. It needs the extra [deepspeed]"""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """deepspeed: what ranks share out: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too"""
    offload: Literal["none", "optimizer"] = "none"
    """deepspeed: optimizer = its state and its work are on the CPU; DeepSpeed compiles its CPUAdam for it at the first start"""
    deepspeed_json: PathText | None = None
    """deepspeed: a file of further options for DeepSpeed; those that other keys here own are refused"""


class KernelsSection(Section):
    """Which implementation of the hot ops runs."""

    backend: Literal["auto", "reference", "torch", "triton", "megablocks"] = "auto"
    """auto: triton on CUDA, torch elsewhere; a backend named here that cannot run is an error"""
    attention: Literal["auto", "sdpa", "varlen", "flash2", "flash3", "flex"] = "auto"
    """auto: flash3 on Hopper where it is installed, else varlen (torch's own flash attention) on CUDA in bf16, sdpa elsewhere;
    flash2 and flash3 need the package flash-attn; a kernel named here that cannot run is an error"""


class CheckpointSection(Section):
    """When training state is written, and how much of it is kept."""

    every: NonNegativeInt = 500
    """steps between checkpoints; 0 = only the last step's"""
    asynchronous: bool = True
    """write in the background while training goes on, from a copy in the host's memory; false = training waits for the disk"""
    keep_last: PositiveInt = 2
    """newest checkpoints that are kept"""
    keep_every: NonNegativeInt = 0
    """checkpoints of steps that this divides are kept for ever; 0 = none"""
    init_from: PathText | None = None
    """a checkpoint, or a run folder with one, whose weights a new run starts from at step 0; a run that goes on does not read it"""


class EvalSection(Section):
    """Validation during training."""

    every: NonNegativeInt = 250
    """steps between validations; 0 = never during training"""
    max_rows: PositiveInt = 128
    """rows of one validation; the last one and the test use every row"""


class SampleSection(Section):
    """Text sampled at the end of training."""

    prompt: str = "def "
    """what the text continues"""
    max_tokens: NonNegativeInt = 200
    """tokens to sample; 0 = none"""
    temperature: NonNegativeFloat = 0.8
    """0 = the likeliest token"""
