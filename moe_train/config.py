"""The whole run as one typed tree: every key that a run file may hold, its default, its meaning and its rules.

Reading files and words into this tree, and reporting what is wrong with them, is `moe_train.cli`. Each router declares its own keys
beside itself, as a subclass of `RouterConfig`; `model.router.name` chooses among the registered ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
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


def _possible(path: str) -> str:
    if "\0" in path or len(path.encode()) > 4000 or max(len(part.encode()) for part in path.split("/")) > 250:
        raise ValueError("no file can have this name")  # 250: Linux has 255, and suffixes are added
    return path


PathText = Annotated[str, AfterValidator(_possible)]


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
    frozen: bool = False
    """the routers' own parameters are not trained (fine-tuning)"""

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

    def layout_conflicts(self, parallel: ParallelSection) -> list[Conflict]:
        """Axes under which this router cannot work; none by default."""
        return []

    def loss_weights(self) -> dict[str, float]:
        """Weight of each entry of Routing.losses in the training loss."""
        return {}

    def active_experts(self, model: ModelConfig) -> int:
        """How many experts' work one token costs in a layer."""
        return self.top_k

    def leaks(self) -> list[str]:
        """What these keys let a token see that a causal model must not, one line each; said when a run starts."""
        return []

    def adaptive_layers(self, model: ModelConfig) -> Sequence[int]:
        """Blocks whose gate adapts to clusters of tokens (ACMoE); `c` in `model.transformer_xl.layers`."""
        return ()


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

    dir: PathText | None = None
    """run folder; default runs/<config>-<time>; a folder that holds a run is resumed"""
    seed: NonNegativeInt = 0
    """seed of initialisation, data order and sampling"""


class TransformerXLSection(Section):
    """The block of the papers' small models (`model.block: transformer_xl`); see moe_train/model/transformer_xl.py."""

    layers: str | None = None
    """two characters for each block: s (self-attention) or . (none), then g (experts), c (experts with an adaptive gate: router acmoe),
    f (dense MLP) or . (none); default: sg for each, or sc where the router is adaptive"""
    attn_type: Literal["table", "relative", "absolute"] = "table"
    """how attention knows positions: table = a learned row for each distance, shared by all blocks (RMoE, ACMoE); relative =
    Transformer-XL's sinusoids of distances; absolute = sinusoids added to the embeddings"""
    attn_span: PositiveInt = 512
    """table: the farthest distance that attention sees"""
    residual: Literal["double", "single"] = "double"
    """double: a norm and a residual inside of those around the experts (RMoE, ACMoE); single: only those around"""
    dropout: Probability = 0.0
    """probability that an entry is dropped in training"""


LLAMA_ONLY = ("num_kv_heads", "shared_expert_size", "num_dense_layers", "moe_layer_freq", "qk_norm", "rope_theta")


class ModelConfig(Section):
    """The decoder: Llama-style or as the papers' small models, with a mixture-of-experts layer in place of the MLP."""

    block: Literal["llama", "transformer_xl"] = "llama"
    """llama: pre-norm, RMSNorm, rotary positions, SwiGLU; transformer_xl: post-norm, LayerNorm, positions by distance, ReLU, biases"""
    transformer_xl: TransformerXLSection = TransformerXLSection()
    """keys of block transformer_xl"""
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
    """width F of one expert"""
    shared_expert_size: NonNegativeInt = 0
    """width of an expert that every token visits; 0 = none"""
    num_dense_layers: NonNegativeInt = 0
    """leading blocks with a dense MLP; router state passes through them untouched"""
    moe_layer_freq: PositiveInt | list[Literal[0, 1]] = 1
    """which of the other blocks have experts: every n-th, from block 0 on (2 is GLaM's placement); or 1 (experts) or 0 (dense MLP)
    for each block"""
    dense_ffn_hidden_size: PositiveInt | None = None
    """width of a dense MLP; default top_k * ffn_hidden_size"""
    vocab_size: PositiveInt | None = None
    """rows of the embedding; default the tokenizer's vocabulary, rounded up to a multiple of 64"""
    tie_embeddings: bool = False
    """the output projection is the embedding"""
    qk_norm: bool | Literal["width"] = False
    """RMSNorm on queries and keys: true = each head by itself; width = all heads together (OLMoE)"""
    rope_theta: PositiveFloat = 10000.0
    """base of the rotary position embedding"""
    norm_eps: PositiveFloat = 1e-5
    """epsilon of norms"""
    init_std: PositiveFloat = 0.02
    """standard deviation of the initial weights"""
    frozen_experts: bool = False
    """the experts are not trained (fine-tuning a new router)"""
    capacity_factor: PositiveFloat | None = None
    """an expert takes at most this times the mean load of a row; choices beyond it are dropped; null = dropless"""
    drop_policy: Literal["position", "score"] = "position"
    """which choices an expert over its capacity drops: position = the latest in the row; score = the lowest scores, which is not
    causal (a later token can push out an earlier one)"""
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
        """Width of a dense MLP."""
        return self.dense_ffn_hidden_size or self.router.top_k * self.ffn_hidden_size

    @property
    def sublayers(self) -> list[str]:
        """The two characters of each block (transformer_xl)."""
        text = self.transformer_xl.layers
        return ["sg"] * self.num_layers if text is None else [text[i : i + 2] for i in range(0, len(text), 2)]

    @property
    def moe_layers(self) -> Sequence[int]:
        """Numbers of the blocks with experts; the others have a dense MLP (Megatron-LM's rule for moe_layer_freq)."""
        if self.block == "transformer_xl":
            return [layer for layer, pair in enumerate(self.sublayers) if pair[1:] in ("g", "c")]
        freq, first = self.moe_layer_freq, self.num_dense_layers
        if isinstance(freq, int):
            return range(-(-first // freq) * freq, self.num_layers, freq)
        return [layer for layer, experts in enumerate(freq[: self.num_layers]) if experts and layer >= first]

    @property
    def has_dense_layers(self) -> bool:
        """Whether a block has a dense MLP."""
        freq = self.moe_layer_freq
        return self.num_dense_layers > 0 or (freq > 1 if isinstance(freq, int) else 0 in freq)

    def leaks(self) -> list[str]:
        """What a token sees that a causal model must not, one line each."""
        found = self.router.leaks()
        if self.capacity_factor is not None and self.drop_policy == "score":
            found.append(
                "model.drop_policy=score: whether an expert takes a token depends on the scores of later tokens of its row"
            )
        return found

    def conflicts(self) -> list[Conflict]:
        """Rules between the model's keys."""
        found = [*self._block_conflicts(), *self._placement_conflicts()]
        if self.head_dim is None and self.hidden_size % self.num_heads:
            rule = f"must divide model.hidden_size={self.hidden_size}"
            found.append(Conflict("model.num_heads", self.num_heads, rule, "change it or set model.head_dim"))
        elif self.head_size % 2 and self.block == "llama":
            found.append(Conflict("model.head_dim", self.head_size, "must be even for rotary embeddings", "use an even width"))
        if self.num_heads % self.kv_heads:
            rule = f"must divide model.num_heads={self.num_heads}"
            found.append(Conflict("model.num_kv_heads", self.kv_heads, rule, "use a divisor"))
        return found + self.router.conflicts(self)

    def _block_conflicts(self) -> list[Conflict]:
        """Keys of the other block, and rules of transformer_xl."""
        if self.block == "llama":
            return _left_out("model.transformer_xl", self.transformer_xl, TransformerXLSection.model_fields, "transformer_xl")
        return _left_out("model", self, LLAMA_ONLY, "llama") + self._transformer_xl_conflicts()

    def _transformer_xl_conflicts(self) -> list[Conflict]:
        keys, layers, found = self.transformer_xl, self.num_layers, []
        if keys.attn_type != "table" and keys.attn_span != TransformerXLSection().attn_span:
            rule = f"attn_type={keys.attn_type} has no span"
            found.append(Conflict("model.transformer_xl.attn_span", keys.attn_span, rule, "leave it out"))
        if keys.attn_type != "table" and self.hidden_size % 2:
            found.append(Conflict("model.hidden_size", self.hidden_size, "must be even for sinusoids", "use an even width"))
        text, path = keys.layers, "model.transformer_xl.layers"
        if text is None:
            return found
        if len(text) != 2 * layers or set(text[::2]) - set("s.") or set(text[1::2]) - set("gcf.") or ".." in self.sublayers:
            rule = f"must be s or . and then g, c, f or . (not both .) for each of model.num_layers={layers} blocks"
            return [*found, Conflict(path, text, rule, f"write {2 * layers} characters, such as {'sg' * layers}")]
        if not self.moe_layers:
            return [*found, Conflict(path, text, "leaves no block with experts", "put a g where experts are wanted")]
        adaptive = self.router.adaptive_layers(self)
        if [layer for layer, pair in enumerate(self.sublayers) if pair[1] == "c"] != list(adaptive):
            rule = f"router {self.router.name} has an adaptive gate in blocks {list(adaptive)}, and c must be in these"
            remedy = "move the c, or change model.router.name or model.router.plain_layers"
            found.append(Conflict(path, text, rule, remedy))
        return found

    def _placement_conflicts(self) -> list[Conflict]:
        if self.block != "llama":
            return []
        freq, layers = self.moe_layer_freq, self.num_layers
        if isinstance(freq, list) and len(freq) != layers:
            rule = f"must have one entry for each of model.num_layers={layers} blocks"
            return [Conflict("model.moe_layer_freq", freq, rule, "give as many, or a number")]
        if self.num_dense_layers >= layers:
            rule = f"must be below model.num_layers={layers}, so that one block has experts"
            return [Conflict("model.num_dense_layers", self.num_dense_layers, rule, "lower it")]
        if not self.moe_layers:
            rule = f"leaves no block with experts (model.num_layers={layers}, model.num_dense_layers={self.num_dense_layers})"
            return [Conflict("model.moe_layer_freq", freq, rule, "lower it, or put a 1 where experts are wanted")]
        return []


def _left_out(path: str, section: Section, keys: Iterable[str], block: str) -> list[Conflict]:
    """Those of the keys below `path` that are set although another block than the model's has them."""
    changed = [key for key in keys if getattr(section, key) != type(section).model_fields[key].default]
    rule = f"only model.block={block} has it"
    return [Conflict(f"{path}.{key}", getattr(section, key), rule, "leave it out") for key in changed]


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
    """The layout: how many ranks along each axis. Ranks are numbered with tp fastest, then cp, dp_shard, dp_replicate, pp."""

    dp_replicate: PositiveInt = 1
    """copies of the sharded state (HSDP)"""
    dp_shard: AutoInt = "auto"
    """ranks that share one copy of parameters, gradients and optimizer state; auto = what is left of the world"""
    sharding: Literal["none", "optimizer", "gradients", "parameters"] = "gradients"
    """what data-parallel ranks share out: `parameters` gathers them in forward and in backward, `gradients` reduces gradients after
    each micro-batch (with pp after the last), `optimizer` only after the last; `none` keeps a whole copy on each rank"""
    tp: PositiveInt = 1
    """tensor parallel ranks, over which rows are sharded too (sequence parallelism)"""
    pp: PositiveInt = 1
    """pipeline ranks"""
    pp_schedule: Literal["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"] = "1f1b"
    """order of a pipeline's work; interleaved, zbv and dualpipev give each rank two stages"""
    pp_layers: list[PositiveInt] | None = None
    """layers of each stage, from the first; default: split so that the costliest stage is as cheap as can be"""
    cp: PositiveInt = 1
    """context parallel ranks, which share out the positions of a row"""
    cp_method: Literal["gather", "ulysses"] = "gather"
    """gather: each rank has some queries and all keys and values; ulysses: each rank has some heads"""
    ep: PositiveInt = 1
    """expert parallel ranks"""
    expert_tp: PositiveInt = 1
    """tensor parallel ranks inside an expert: 1 or tp"""
    timeout_seconds: PositiveInt = 600
    """a collective that takes longer ends the run with an error"""

    @property
    def stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.pp * (2 if self.pp > 1 and self.pp_schedule in ("interleaved", "zbv", "dualpipev") else 1)

    def conflicts(self) -> list[Conflict]:
        """Rules between the axes."""
        found = []
        if self.expert_tp not in (1, self.tp):
            rule = f"must be 1 or parallel.tp={self.tp}"
            found.append(Conflict("parallel.expert_tp", self.expert_tp, rule, "use one of the two"))
        if self.pp > 1 and self.sharding == "parameters":
            rule = "cannot be combined with pp: zero-bubble schedules would compute wrong gradients, others gather for each micro-batch"
            found.append(Conflict("parallel.sharding", self.sharding, rule, "use gradients or optimizer"))
        if self.pp_layers is not None and len(self.pp_layers) != self.stages:
            rule = f"must name the layers of {self.stages} stages (pp={self.pp}, {self.pp_schedule})"
            found.append(Conflict("parallel.pp_layers", self.pp_layers, rule, "give one number per stage"))
        return found


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
        found = [*self.model.conflicts(), *self.data.conflicts(), *self.parallel.conflicts(), *self._sharding_conflicts()]
        found += self.model.router.layout_conflicts(self.parallel)
        if self.model.block == "transformer_xl":
            axes = {axis: getattr(self.parallel, axis) for axis in ("tp", "pp", "cp", "ep", "expert_tp")}
            rule = "model.block=transformer_xl runs in one process or data parallel"
            found += [Conflict(f"parallel.{axis}", n, rule, "use 1, or model.block=llama") for axis, n in axes.items() if n > 1]
        train, optim = self.train, self.optim
        if train.global_batch_size % train.micro_batch_size:
            rule = f"must be a multiple of train.micro_batch_size={train.micro_batch_size}"
            found.append(Conflict("train.global_batch_size", train.global_batch_size, rule, "change one of the two"))
        if optim.min_lr > optim.lr:
            found.append(Conflict("optim.min_lr", optim.min_lr, f"must be at most optim.lr={optim.lr}", "lower it"))
        if train.device == "cpu" and self.kernels.backend == "triton":
            rule = "needs CUDA, and train.device is cpu"
            found.append(Conflict("kernels.backend", "triton", rule, "use auto"))
        if train.dtype == "fp64" and self.kernels.backend not in ("reference", "torch"):
            rule = "must be reference or torch where train.dtype is fp64"
            found.append(Conflict("kernels.backend", self.kernels.backend, rule, "set it to one of the two"))
        return found

    def layout_conflicts(self, world_size: int) -> list[Conflict]:
        """Every broken rule of the layout on `world_size` ranks."""
        parallel = self.parallel
        fixed = parallel.dp_replicate * parallel.tp * parallel.pp * parallel.cp
        if world_size % fixed:
            rule = f"with dp_replicate*tp*pp*cp={fixed}, the number of ranks must be a multiple of {fixed}"
            return [Conflict("world size", world_size, rule, "change the axes or --nproc-per-node")]
        if parallel.dp_shard != "auto" and parallel.dp_shard * fixed != world_size:
            rule = f"times dp_replicate*tp*pp*cp={fixed} must be the number of ranks, {world_size}"
            return [Conflict("parallel.dp_shard", parallel.dp_shard, rule, "use auto")]
        shard = world_size // fixed
        return [*self._batch_conflicts(parallel.dp_replicate * shard), *self._expert_conflicts(shard)]

    def _batch_conflicts(self, data_ranks: int) -> list[Conflict]:
        train, parallel = self.train, self.parallel
        found = []
        batch, micro = train.global_batch_size, train.micro_batch_size
        if batch % (micro * data_ranks):
            rule = f"must be a multiple of train.micro_batch_size={micro} times {data_ranks} data-parallel ranks"
            found.append(Conflict("train.global_batch_size", batch, rule, "change the batch or the ranks"))
            return found
        count = batch // (micro * data_ranks)
        if parallel.pp > 1 and parallel.pp_schedule == "dualpipev" and count < 2 * parallel.pp:
            rule = f"gives {count} micro-batches to each pipeline; dualpipev needs at least 2*pp={2 * parallel.pp}"
            found.append(Conflict("train.global_batch_size", batch, rule, "raise it or use another parallel.pp_schedule"))
        if parallel.pp > 1 and parallel.pp_schedule == "interleaved" and count % parallel.pp:
            rule = f"gives {count} micro-batches to each pipeline; interleaved needs a multiple of pp={parallel.pp}"
            found.append(Conflict("train.global_batch_size", batch, rule, "change it or use another parallel.pp_schedule"))
        return found

    def _expert_conflicts(self, dp_shard: int) -> list[Conflict]:
        parallel = self.parallel
        if dp_shard * parallel.cp % parallel.ep:
            rule = f"must divide dp_shard*cp={dp_shard}*{parallel.cp}, whose ranks share the experts out"
            return [Conflict("parallel.ep", parallel.ep, rule, "use a divisor")]
        return []

    def _sharding_conflicts(self) -> list[Conflict]:
        """Rules between the model's and rows' sizes and the axes that divide them."""
        parallel, model, train = self.parallel, self.model, self.train
        tp, cp = parallel.tp, parallel.cp
        divided: list[tuple[str, int, str, int]] = [
            ("model.num_heads", model.num_heads, "parallel.tp", tp),
            ("model.num_kv_heads", model.kv_heads, "parallel.tp", tp),
            ("model.num_experts", model.num_experts, "parallel.ep", parallel.ep),
            ("model.ffn_hidden_size", model.ffn_hidden_size, "parallel.expert_tp", parallel.expert_tp),
            ("model.shared_expert_size", model.shared_expert_size, "parallel.tp", tp),
        ]
        if model.has_dense_layers:
            divided.append(("model.dense_ffn_hidden_size", model.dense_size, "parallel.tp", tp))
        if model.vocab_size:
            divided.append(("model.vocab_size", model.vocab_size, "parallel.tp", tp))
        if cp > 1 and parallel.cp_method == "ulysses":
            divided += [("model.num_heads", model.num_heads, "parallel.tp * parallel.cp", tp * cp)]
            divided += [("model.num_kv_heads", model.kv_heads, "parallel.tp * parallel.cp", tp * cp)]
            divided.append(("train.seq_len", train.seq_len, "parallel.cp * parallel.tp", cp * tp))
        elif cp > 1:
            divided.append(("train.seq_len", train.seq_len, "2 * parallel.cp * parallel.tp", 2 * cp * tp))
        else:
            divided.append(("train.seq_len", train.seq_len, "parallel.tp", tp))
        remedy = "change one of the two"
        found = [Conflict(key, n, f"must be a multiple of {name}={axis}", remedy) for key, n, name, axis in divided if n % axis]
        if tp > 1 and model.qk_norm == "width":
            rule = "splits the heads, and model.qk_norm=width norms all of them together"
            found.append(Conflict("parallel.tp", tp, rule, "use 1"))
        return found + self._pipeline_conflicts()

    def _pipeline_conflicts(self) -> list[Conflict]:
        parallel, model = self.parallel, self.model
        if parallel.pp == 1:
            return []
        found = []
        if model.num_layers < parallel.stages:
            rule = f"must be at least the {parallel.stages} pipeline stages (pp={parallel.pp}, {parallel.pp_schedule})"
            found.append(Conflict("model.num_layers", model.num_layers, rule, "add layers or lower parallel.pp"))
        if parallel.pp_layers is not None and sum(parallel.pp_layers) != model.num_layers:
            rule = f"must add up to model.num_layers={model.num_layers}"
            found.append(Conflict("parallel.pp_layers", parallel.pp_layers, rule, "change it"))
        if self.train.recompute != "none" and parallel.pp_schedule in ("zbv", "dualpipev"):
            rule = f"with pp_schedule={parallel.pp_schedule} a layer would be recomputed up to ten times"
            found.append(Conflict("train.recompute", self.train.recompute, rule, "use 1f1b or interleaved, or recompute none"))
        return found


def build_schema() -> None:
    """Make `Config` know the routers registered until now; reading a run calls it."""
    ModelConfig.model_rebuild(force=True)
    Config.model_rebuild(force=True)
