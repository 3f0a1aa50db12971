"""The whole run as one typed tree: every key that a run file may hold, its default, its meaning and its rules.

Reading files and words into this tree, and reporting what is wrong with them, is `moe_train.cli`. Each router declares its own keys
beside itself, as a subclass of `RouterConfig`; `model.router.name` chooses among the registered ones.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic_core import CoreSchema, core_schema

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
AutoInt = PositiveInt | Literal["auto"]


class Conflict(NamedTuple):
    """One broken rule between keys that are each valid alone."""

    path: str
    value: object
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}={self.value}: {self.rule}; {self.remedy}"


class Section(BaseModel):
    """A group of keys: frozen, unknown keys refused, infinities refused, the line under each key is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class RouterConfig(Section):
    """Base of every router's keys. Defining a subclass with a literal `name` registers it."""

    registry: ClassVar[dict[str, type[RouterConfig]]] = {}

    name: str
    """which router"""
    top_k: PositiveInt = 2
    """experts per token"""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Register the subclass. Two different routers of one name are a programming error."""
        name = cls.model_fields["name"].default
        if not isinstance(name, str):
            return
        other = RouterConfig.registry.get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two routers are named {name!r}: {other} and {cls}")
        RouterConfig.registry[name] = cls

    def conflicts(self, model: ModelConfig) -> list[Conflict]:
        """Rules between this router's keys and the model's; a subclass adds its own to these."""
        if self.top_k > model.num_experts:
            rule = f"must be at most model.num_experts={model.num_experts}"
            return [Conflict("model.router.top_k", self.top_k, rule, "lower it or add experts")]
        return []

    def loss_weights(self) -> dict[str, float]:
        """Weight of each entry of Routing.losses in the training loss."""
        return {}


class _RegisteredRouter:
    """Annotation: validated as the registered RouterConfig that `name` says (a union over the routers known when it is built)."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not RouterConfig.registry:  # this module alone was imported; build_schema() runs again before anything is read
            return handler.generate_schema(RouterConfig)
        choices = {name: handler.generate_schema(kind) for name, kind in sorted(RouterConfig.registry.items())}
        return core_schema.tagged_union_schema(choices, discriminator="name")


def _default_router() -> RouterConfig:
    return RouterConfig.registry["recurrent"](name="recurrent")


class RunSection(Section):
    """Where the run lives and what makes it reproducible."""

    dir: str | None = None
    """run folder; default runs/<config>-<time>; a folder that holds a run is resumed"""
    seed: NonNegativeInt = 0
    """seed of initialisation, data order and sampling"""


class ModelConfig(Section):
    """The decoder: Llama-style, with a mixture-of-experts layer in place of the MLP."""

    hidden_size: PositiveInt = 128
    """width D of the residual stream"""
    num_layers: PositiveInt = 4
    """decoder blocks, dense ones included"""
    num_heads: PositiveInt = 4
    """query heads"""
    num_kv_heads: PositiveInt | None = None
    """key and value heads; default num_heads"""
    head_dim: PositiveInt | None = None
    """width of a head; default hidden_size / num_heads"""
    num_experts: PositiveInt = 8
    """experts E of a layer"""
    ffn_hidden_size: PositiveInt = 128
    """width F of one SwiGLU expert"""
    shared_expert_size: NonNegativeInt = 0
    """width of an expert that every token visits; 0 = none"""
    num_dense_layers: NonNegativeInt = 0
    """leading blocks with a dense MLP; router state passes through them untouched"""
    dense_ffn_hidden_size: PositiveInt | None = None
    """width of the dense MLP; default top_k * ffn_hidden_size"""
    vocab_size: PositiveInt | None = None
    """rows of the embedding; default the tokenizer's vocabulary, rounded up to a multiple of 64"""
    tie_embeddings: bool = False
    """the output projection is the embedding"""
    qk_norm: bool = False
    """RMSNorm on each query and key head"""
    rope_theta: PositiveFloat = 10000.0
    """base of the rotary position embedding"""
    norm_eps: PositiveFloat = 1e-5
    """epsilon of RMSNorm"""
    init_std: PositiveFloat = 0.02
    """standard deviation of the initial weights"""
    router: Annotated[RouterConfig, _RegisteredRouter] = Field(default_factory=_default_router)
    """the router: its name and its own keys"""

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def dense_size(self) -> int:
        """Width of a leading dense MLP."""
        return self.dense_ffn_hidden_size or self.router.top_k * self.ffn_hidden_size

    def conflicts(self) -> list[Conflict]:
        """Rules between the model's keys."""
        found = []
        if self.head_dim is None and self.hidden_size % self.num_heads:
            rule = f"must divide model.hidden_size={self.hidden_size}"
            found.append(Conflict("model.num_heads", self.num_heads, rule, "change it or set model.head_dim"))
        elif self.head_size % 2:
            found.append(Conflict("model.head_dim", self.head_size, "must be even for rotary embeddings", "use an even width"))
        if self.num_heads % self.kv_heads:
            rule = f"must divide model.num_heads={self.num_heads}"
            found.append(Conflict("model.num_kv_heads", self.kv_heads, rule, "use a divisor"))
        if self.num_dense_layers >= self.num_layers:
            rule = f"must be below model.num_layers={self.num_layers}, so that one block has experts"
            found.append(Conflict("model.num_dense_layers", self.num_dense_layers, rule, "lower it"))
        return found + self.router.conflicts(self)


class DataSection(Section):
    """Prepared corpora: prefixes of .bin/.idx pairs, as `launch/prepare_data.py` or Megatron-LM write them."""

    train: str | list[str] | None = None
    """training prefixes; default: the corpus made from Python's standard library, under data/stdlib"""
    valid: str | list[str] | None = None
    """validation prefixes; default as for train"""
    test: str | list[str] | None = None
    """prefixes evaluated once at the end of training; default as for train"""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a SentencePiece model: what the corpora were prepared with"""
    mask_documents: bool = True
    """attention stays inside a document when a row packs several"""


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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one"""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """compute dtype; auto: bf16 on CUDA, fp32 on CPU. Master weights, router and optimizer are fp32 either way"""
    recompute: Literal["none", "selective", "full"] = "none"
    """activations that backward computes again instead of keeping: selective = experts and dense MLPs, full = attention too;
    routing is always kept"""
    log_every: PositiveInt = 10
    """steps between lines of metrics"""


class OptimSection(Section):
    """AdamW, its schedule and gradient clipping."""

    lr: PositiveFloat = 3e-3
    """peak learning rate"""
    min_lr: NonNegativeFloat = 3e-4
    """learning rate at the last step"""
    warmup_steps: NonNegativeInt = 100
    """steps of linear warm-up from 0; cosine decay follows"""
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


class ParallelSection(Section):
    """The layout: how many ranks along each axis."""

    dp_replicate: PositiveInt = 1
    """copies of the sharded state (HSDP)"""
    dp_shard: AutoInt = "auto"
    """ranks that share one copy of parameters, gradients and optimizer state; auto = what is left of the world"""
    sharding: Literal["optimizer", "gradients", "parameters"] = "gradients"
    """what is sharded between uses: `parameters` gathers them in forward and in backward, `gradients` reduces gradients after
    each micro-batch, `optimizer` only after the last"""
    tp: PositiveInt = 1
    """tensor (and sequence) parallel ranks"""
    pp: PositiveInt = 1
    """pipeline stages"""
    cp: PositiveInt = 1
    """context parallel ranks"""
    ep: PositiveInt = 1
    """expert parallel ranks"""
    expert_tp: PositiveInt = 1
    """tensor parallel ranks inside an expert"""

    def conflicts(self) -> list[Conflict]:
        """Axes that this version does not have yet."""
        axes = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "ep": self.ep, "expert_tp": self.expert_tp}
        rule = "only 1 is supported in this version"
        return [Conflict(f"parallel.{axis}", n, rule, "use parallel.dp_shard") for axis, n in axes.items() if n != 1]


class EngineSection(Section):
    """Which engine runs the step."""

    name: Literal["native"] = "native"
    """native: FSDP2"""


class KernelsSection(Section):
    """Which implementation of the hot ops runs."""

    backend: Literal["auto", "reference", "torch", "triton"] = "auto"
    """auto: triton on CUDA, torch elsewhere; a backend named here that cannot run is an error"""


class CheckpointSection(Section):
    """When training state is written, and how much of it is kept."""

    every: NonNegativeInt = 500
    """steps between checkpoints; 0 = only the last step's"""
    keep_last: PositiveInt = 2
    """newest checkpoints that are kept"""
    keep_every: NonNegativeInt = 0
    """checkpoints of steps that this divides are kept for ever; 0 = none"""


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


class Config(Section):
    """A run."""

    run: RunSection = RunSection()
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    engine: EngineSection = EngineSection()
    kernels: KernelsSection = KernelsSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    sample: SampleSection = SampleSection()

    def conflicts(self) -> list[Conflict]:
        """Every broken rule between keys that can be seen without knowing the number of ranks."""
        found = [*self.model.conflicts(), *self.parallel.conflicts()]
        train, optim = self.train, self.optim
        if train.global_batch_size % train.micro_batch_size:
            rule = f"must be a multiple of train.micro_batch_size={train.micro_batch_size}"
            found.append(Conflict("train.global_batch_size", train.global_batch_size, rule, "change one of the two"))
        if optim.min_lr > optim.lr:
            found.append(Conflict("optim.min_lr", optim.min_lr, f"must be at most optim.lr={optim.lr}", "lower it"))
        if train.device == "cpu" and self.kernels.backend == "triton":
            rule = "needs CUDA, and train.device is cpu"
            found.append(Conflict("kernels.backend", "triton", rule, "use auto"))
        return found

    def layout_conflicts(self, world_size: int) -> list[Conflict]:
        """Every broken rule of the layout on `world_size` ranks."""
        parallel, train = self.parallel, self.train
        fixed = parallel.dp_replicate * parallel.tp * parallel.pp * parallel.cp
        found = []
        if world_size % fixed:
            rule = f"with dp_replicate*tp*pp*cp={fixed}, the number of ranks must be a multiple of {fixed}"
            found.append(Conflict("world size", world_size, rule, "change the axes or --nproc-per-node"))
        elif parallel.dp_shard != "auto" and parallel.dp_shard * fixed != world_size:
            rule = f"times dp_replicate*tp*pp*cp={fixed} must be the number of ranks, {world_size}"
            found.append(Conflict("parallel.dp_shard", parallel.dp_shard, rule, "use auto"))
        data_ranks = max(world_size // (parallel.tp * parallel.pp * parallel.cp), 1)
        if train.global_batch_size % (train.micro_batch_size * data_ranks):
            rule = (
                f"must be a multiple of train.micro_batch_size={train.micro_batch_size} times {data_ranks} data-parallel ranks"
            )
            found.append(Conflict("train.global_batch_size", train.global_batch_size, rule, "change the batch or the ranks"))
        return found


def build_schema() -> None:
    """Make `Config` know the routers registered until now; reading a run calls it."""
    ModelConfig.model_rebuild(force=True)
    Config.model_rebuild(force=True)
