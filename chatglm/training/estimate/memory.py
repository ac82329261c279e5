"""Owns the arithmetic of a training: the memory of each GPU, and the work of each token.

All follows from a model's sizes and a stage's keys. What is counted is a step of the language model
on rows of the full length. A pair of answers is two rows; PPO's other models and the cache of its
rollouts come on top. Does not know files or command lines (`report`).

Shapes: `B` rows, `S` tokens of a row, `K` keys (a P-Tuning prefix before the row), `H` hidden, `I`
inner, `N` heads, `D` head dim, `L` layers, `V` vocabulary.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from chatglm.training.layers import NORMS, TABLES, expand_targets, split_names
from chatglm.training.models import choose_weights
from chatglm.training.settings import LORA_TARGET, Settings

FLOAT32_BYTES = 4
FLOAT16_BYTES = 2  # A bfloat16 has as many.
INT64_BYTES = 8  # Token ids are of this type.
SHARDINGS = ("ddp", "zero2", "zero3", "fsdp2")
# What an optimizer keeps of a trained parameter: so many values of its dtype, or so many bytes.
OPTIMIZER_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}
OPTIMIZER_BYTES = {"adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2}
# DeepSpeed keeps of each trained parameter a float32 copy and Adam's two states of it, in bytes.
ENGINE_BYTES = 12
# ZeRO-3 gathers at most so many weights at once, unless its file says otherwise.
LIVE_WEIGHTS = 10**9
# A communication of ZeRO takes so many weights, unless its file says otherwise.
BUCKET_WEIGHTS = 2 * 10**8
# Bytes of a logit while its gradient is computed: its log-probability and two gradients, each in
# float32.
LOGIT_BYTES = 3 * FLOAT32_BYTES
# The backward pass of attention takes so many times the work of the forward pass, which has two
# products: the scores are computed again, and four products follow.
ATTENTION_BACKWARD = 2.5


class Shape(NamedTuple):
    """The sizes of a model.

    Attributes:
        vocab_size, hidden_size, inner_hidden_size, num_layers, num_attention_heads: V, H, I, L, N.
        window: tokens of a row that the model was made for.
        is_tied: whether the head is the embedding.
        bits, group_size: of the weights, if the folder has packed ones; else 0.
        packs_embeddings: whether the embedding is packed too.
    """

    vocab_size: int
    hidden_size: int
    inner_hidden_size: int
    num_layers: int
    num_attention_heads: int
    window: int
    is_tied: bool = True
    bits: int = 0
    group_size: int = 0
    packs_embeddings: bool = False

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The matrices of a block, each `(O, I)`."""
        hidden, inner = self.hidden_size, self.inner_hidden_size
        return {
            "query_key_value": (3 * hidden, hidden),
            "dense": (hidden, hidden),
            "dense_h_to_4h": (inner, hidden),
            "dense_4h_to_h": (hidden, inner),
        }

    @property
    def block_parameters(self) -> int:
        """Parameters in the matrices of all blocks."""
        return self.num_layers * sum(rows * columns for rows, columns in self.matrices.values())

    @property
    def vector_parameters(self) -> int:
        """Parameters in all biases and norms."""
        biases = sum(rows for rows, _ in self.matrices.values())
        return self.num_layers * (biases + 4 * self.hidden_size) + 2 * self.hidden_size

    @property
    def table_parameters(self) -> int:
        """Parameters in the embedding, and in the head if it is not the same."""
        return (1 if self.is_tied else 2) * self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.block_parameters + self.vector_parameters + self.table_parameters


@dataclass
class Job:
    """What a training's memory depends on, under the keys of the stages, and on how many GPUs.

    Attributes:
        max_length to optim: as the stages have them (`Settings`, `TrainingArguments`).
        gpus: how many train together.
        sharding: "ddp" (every GPU has all), "zero2", "zero3" or "fsdp2".
        offload: "optimizer" and "param" are those parts that ZeRO keeps in the host's memory.
        live_weights, bucket_weights: parameters that ZeRO-3 gathers at once, and of a
            communication.
    """

    max_length: int = 0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    dtype: str = ""
    bf16: bool = False
    fp16: bool = False
    bits: int = 0
    group_size: int = 0
    lora_rank: int = 0
    lora_targets: list[str] = field(default_factory=lambda: [LORA_TARGET])
    modules_to_save: list[str] = field(default_factory=list)
    use_dora: bool = False
    pre_seq_len: int = 0
    prefix_projection: bool = False
    optim: str = "adamw_torch_fused"
    gpus: int = 1
    sharding: str = "ddp"
    offload: list[str] = field(default_factory=list)
    live_weights: int = LIVE_WEIGHTS
    bucket_weights: int = BUCKET_WEIGHTS

    @property
    def adapted(self) -> list[str]:
        """The matrices of a block that get adapters."""
        names = expand_targets(self.lora_targets) if self.lora_rank else []
        return [name.rpartition(".")[2] for name in names]

    @property
    def trains_all(self) -> bool:
        """Whether the model itself is trained, and nothing beside it."""
        return not (self.lora_rank or self.pre_seq_len)

    @property
    def has_engine(self) -> bool:
        """Whether DeepSpeed holds the model, and casts all of it to bfloat16 or float16."""
        return self.sharding.startswith("zero")

    @property
    def uses_16_bits(self) -> bool:
        """Whether products are computed in bfloat16 or float16."""
        return self.bf16 or self.fp16

    @property
    def uses_autocast(self) -> bool:
        """Whether weights are cast for each product; norms and residuals are float32 then."""
        return self.uses_16_bits and not self.has_engine

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the model's weights that are not packed."""
        compute_dtype = torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None
        if self.has_engine and compute_dtype is not None:
            return compute_dtype
        is_frozen = not (self.trains_all or self.modules_to_save)
        return choose_weights(Settings(dtype=self.dtype), compute_dtype, is_frozen)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight that is not packed."""
        return self.weight_dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale of packed weights, which bfloat16 would round."""
        return FLOAT16_BYTES if self.weight_dtype == torch.float16 else FLOAT32_BYTES

    @property
    def product_bytes(self) -> int:
        """Bytes of a value that a product gives."""
        return FLOAT16_BYTES if self.uses_16_bits else self.weight_bytes

    @property
    def residual_bytes(self) -> int:
        """Bytes of a value between the blocks."""
        return FLOAT32_BYTES if self.uses_autocast else self.weight_bytes

    @property
    def trained_bytes(self) -> int:
        """Bytes of a parameter that is trained; adapters and prefixes are float32."""
        if self.has_engine and self.uses_16_bits:
            return FLOAT16_BYTES
        return self.weight_bytes if self.trains_all else FLOAT32_BYTES


class Memory(NamedTuple):
    """Bytes of a training step, on each GPU and in the host's memory for each of them.

    Attributes:
        weights: of the model and its adapters.
        gradients: of what is trained.
        optimizer: its states, and DeepSpeed's float32 copy.
        activations: what the forward pass keeps for the backward pass, the mask among it; with
            checkpointing also what one block keeps.
        logits: log-probabilities and gradients of the last layer.
        casts: 16-bit copies of float32 weights, unless blocks are computed again.
        buffers: of the communication, and weights that are gathered.
        host: in the host's memory.
        peak: the most at once on the GPU.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    casts: int
    buffers: int
    host: int
    peak: int


class Work(NamedTuple):
    """Floating-point operations of a token, on average over a row.

    Attributes:
        forward, backward: of the step.
        recomputed: of the forward pass that checkpointing does again.
    """

    forward: float
    backward: float
    recomputed: float

    @property
    def total(self) -> float:
        """All that is done for a token."""
        return sum(self)


def count_trained(shape: Shape, job: Job) -> int:
    """Return how many parameters are trained."""
    if job.trains_all:
        return shape.parameters
    adapted = sum(sum(shape.matrices[name]) for name in job.adapted)
    adapters = shape.num_layers * job.lora_rank * adapted + count_whole(shape, job)
    if job.use_dora:
        adapters += shape.num_layers * sum(shape.matrices[name][0] for name in job.adapted)
    hidden, states = shape.hidden_size, 2 * shape.num_layers * shape.hidden_size
    if not job.prefix_projection:
        return adapters + job.pre_seq_len * states
    return adapters + (job.pre_seq_len + hidden + 1) * hidden + (hidden + 1) * states


def count_whole(shape: Shape, job: Job) -> int:
    """Return how many parameters are trained whole beside adapters; the model keeps its own too."""
    sizes = {name: shape.num_layers * (math.prod(m) + m[0]) for name, m in shape.matrices.items()}
    sizes |= dict.fromkeys(TABLES, shape.vocab_size * shape.hidden_size)
    sizes |= dict.fromkeys(NORMS[:2], 2 * shape.num_layers * shape.hidden_size)
    sizes[NORMS[2]] = 2 * shape.hidden_size
    return sum(sizes[name.rpartition(".")[2]] for name in split_names(job.modules_to_save))


def count_weights(shape: Shape, job: Job) -> int:
    """Return the bytes of a whole model with what is trained beside it."""
    table = [(shape.vocab_size, shape.hidden_size)] * (1 if shape.is_tied else 2)
    table_bits = shape.bits if shape.packs_embeddings else 0
    matrices = sum(_matrix_bytes(size, job, job.bits) for size in shape.matrices.values())
    tables = sum(_matrix_bytes(size, job, table_bits) for size in table)
    beside = 0 if job.trains_all else count_trained(shape, job) * job.trained_bytes
    vectors = shape.vector_parameters * job.weight_bytes
    return shape.num_layers * matrices + tables + vectors + beside


def _matrix_bytes(size: tuple[int, int], job: Job, bits: int) -> int:
    rows, columns = size
    if not bits:
        return rows * columns * job.weight_bytes
    groups = columns // job.group_size if job.group_size else 1
    return rows * columns * bits // 8 + rows * groups * job.scale_bytes


def count_optimizer(shape: Shape, job: Job) -> int:
    """Return the bytes of the optimizer's states of all that is trained."""
    trained = count_trained(shape, job)
    if job.has_engine:
        return trained * ENGINE_BYTES
    if job.optim in OPTIMIZER_BYTES:
        return trained * OPTIMIZER_BYTES[job.optim]
    return trained * OPTIMIZER_STATES[job.optim] * job.trained_bytes


def count_block(shape: Shape, job: Job) -> int:
    """Return the bytes that one block keeps of a batch for its backward pass."""
    tokens = job.per_device_train_batch_size * job.max_length
    keys = job.per_device_train_batch_size * (job.max_length + job.pre_seq_len)
    hidden, narrow = shape.hidden_size, job.product_bytes
    norms = 2 * tokens * (hidden * job.residual_bytes + 2 * FLOAT32_BYTES)
    # Queries and keys turn into new tensors, values stay where the joint projection has put them,
    # unless a prefix is put before them.
    attended = tokens * 2 * hidden if job.pre_seq_len else tokens * 5 * hidden
    attended += 2 * keys * hidden if job.pre_seq_len else 0
    attention = (attended + (0 if job.pre_seq_len else tokens * hidden)) * narrow
    attention += tokens * shape.num_attention_heads * FLOAT32_BYTES
    gelu = tokens * shape.inner_hidden_size * narrow
    return norms + attention + gelu + tokens * _count_inputs(shape, job)


def _count_inputs(shape: Shape, job: Job) -> int:
    """Return the bytes of a token that the trained products of a block keep of their inputs.

    The input of `dense` is what attention gave, which that keeps itself.
    """
    names = shape.matrices if job.trains_all else job.adapted
    width = job.product_bytes
    if job.lora_rank:
        width = width if job.uses_autocast else job.trained_bytes
    shared = {"dense"} if width == job.product_bytes else set()
    inputs = sum(shape.matrices[name][1] for name in names if name not in shared)
    # DoRA scales what the layer gives, and what its adapter gives.
    scaled = sum(2 * shape.matrices[name][0] for name in names) if job.use_dora else 0
    return (inputs + len(names) * job.lora_rank) * width + scaled * job.product_bytes


def count_activations(shape: Shape, job: Job) -> int:
    """Return the bytes that the whole model keeps of a batch, but for the logits."""
    rows, length = job.per_device_train_batch_size, job.max_length
    tokens, hidden = rows * length, shape.hidden_size
    block = count_block(shape, job)
    if job.gradient_checkpointing:
        blocks = block + shape.num_layers * tokens * hidden * job.residual_bytes
    else:
        blocks = shape.num_layers * block
    head_dim = hidden // shape.num_attention_heads
    angles = 2 * tokens * head_dim * job.weight_bytes
    mask = rows * length * (length + job.pre_seq_len) * job.product_bytes
    last = tokens * (hidden * job.residual_bytes + 2 * FLOAT32_BYTES + 2 * INT64_BYTES)
    last += tokens * hidden * job.product_bytes if job.trains_all else 0
    # Dropout keeps a byte for each value of a prefix.
    dropped = rows * job.pre_seq_len * 2 * shape.num_layers * hidden
    return blocks + angles + mask + last + dropped


def count_logits(shape: Shape, job: Job) -> int:
    """Return the bytes of the vocabulary's scores when the loss is differentiated, at most.

    Only tokens that are learned have them; here every one is.
    """
    return job.per_device_train_batch_size * job.max_length * shape.vocab_size * LOGIT_BYTES


def count_casts(shape: Shape, job: Job) -> tuple[int, int]:
    """Return the bytes of 16-bit copies of float32 weights: of a block, and of the head.

    FSDP2 gathers its parts in 16 bits.
    """
    if not job.uses_autocast or job.weight_bytes == FLOAT16_BYTES or job.sharding == "fsdp2":
        return 0, 0
    block = 0 if job.bits else shape.block_parameters // shape.num_layers
    return block * FLOAT16_BYTES, shape.vocab_size * shape.hidden_size * FLOAT16_BYTES


def count_buffers(shape: Shape, job: Job) -> int:
    """Return the bytes that the communication between GPUs takes on each."""
    if job.gpus == 1:
        return 0
    trained = count_trained(shape, job)
    if job.sharding == "ddp":
        return trained * job.trained_bytes
    if job.has_engine:
        gathered = min(job.live_weights, shape.parameters) if job.sharding == "zero3" else 0
        return (gathered + 2 * min(job.bucket_weights, shape.parameters)) * job.product_bytes
    # FSDP2: the block in work and the next one, and the table, which stays gathered.
    block = shape.block_parameters // shape.num_layers
    weights = 2 * block + shape.table_parameters
    gradients = block + shape.table_parameters if job.trains_all else 0
    return (weights + gradients) * job.product_bytes


def list_moments(shape: Shape, job: Job, gradients: int) -> dict[str, int]:
    """Return the bytes beside weights and states when they may be most.

    Args:
        shape: of the model.
        job: the training.
        gradients: bytes of all of them on this GPU.

    Returns:
        Of the end of the forward pass, the differentiated loss, the first block of the backward
        pass and its last one.
    """
    tokens = job.per_device_train_batch_size * job.max_length
    block, logits = count_block(shape, job), count_logits(shape, job)
    block_casts, head_casts = count_casts(shape, job)
    kept = count_activations(shape, job)
    # Weights that are not trained are cast anew for each product, and kept for the backward pass.
    casts = head_casts + shape.num_layers * block_casts
    at_loss = casts
    if job.gradient_checkpointing:
        kept, at_loss = kept - block, head_casts
        casts = casts if job.trains_all else head_casts
    widest = tokens * shape.inner_hidden_size * job.product_bytes * (1 if job.trains_all else 2)
    work = widest + block_casts + _count_unpacked(shape, job)
    work += _count_norms(shape, job)
    is_whole = job.trains_all and job.sharding == "ddp"
    table = shape.vocab_size * shape.hidden_size * job.trained_bytes if is_whole else 0
    again = block if job.gradient_checkpointing else 0
    moments = {
        "forward": kept + logits * 5 // 6 + casts,
        "loss": kept + logits + at_loss,
        "first block": kept + again + work + table,
    }
    if job.gradient_accumulation_steps > 1:
        moments = {name: size + gradients for name, size in moments.items()}
    return moments | {"last block": gradients + block + work}


def _count_norms(shape: Shape, job: Job) -> int:
    """Return the bytes that DoRA takes for the length of the rows of one matrix, at most.

    peft multiplies an identity by both factors, and adds the product to the weight.
    """
    if not job.use_dora:
        return 0
    sizes = [shape.matrices[name] for name in job.adapted]
    values = max(i * i + i * job.lora_rank + 3 * o * i for o, i in sizes)
    casts = max(i * i + 2 * o * i for o, i in sizes) if job.uses_autocast else 0
    return values * FLOAT32_BYTES + casts * FLOAT16_BYTES


def _count_unpacked(shape: Shape, job: Job) -> int:
    """Return the bytes of the largest matrix while it is unpacked, in two forms."""
    if not job.bits:
        return 0
    largest = max(rows * columns for rows, columns in shape.matrices.values())
    return 2 * largest * job.product_bytes


def plan_memory(shape: Shape, job: Job) -> Memory:
    """Return the bytes of a training step on each GPU."""
    cut = job.gpus if job.sharding in ("zero3", "fsdp2") else 1
    weights = -(-count_weights(shape, job) // cut)
    cut = 1 if job.sharding == "ddp" else job.gpus
    gradients = -(-count_trained(shape, job) * job.trained_bytes // cut)
    optimizer = -(-count_optimizer(shape, job) // cut)
    host = 0
    if "optimizer" in job.offload:
        host, gradients, optimizer = gradients + optimizer, 0, 0
    if "param" in job.offload and job.sharding == "zero3":
        host, weights = host + weights, 0
    block_casts, head_casts = count_casts(shape, job)
    buffers = count_buffers(shape, job)
    moments = list_moments(shape, job, gradients)
    return Memory(
        weights,
        gradients,
        optimizer,
        activations=count_activations(shape, job),
        logits=count_logits(shape, job),
        casts=head_casts + shape.num_layers * block_casts,
        buffers=buffers,
        host=host,
        peak=weights + optimizer + buffers + max(moments.values()),
    )


def count_work(shape: Shape, job: Job) -> Work:
    """Return the operations of a token.

    A product costs two for each weight, and as much for the gradient of its input; where weights
    are trained, as much again. A token of a row meets every key of it, hidden or not.
    """
    keys = job.max_length + job.pre_seq_len
    attention = 4.0 * shape.num_layers * keys * shape.hidden_size
    blocks = 2.0 * shape.block_parameters
    head = 2.0 * shape.vocab_size * shape.hidden_size
    adapted = sum(sum(shape.matrices[name]) for name in job.adapted)
    adapters = 2.0 * shape.num_layers * job.lora_rank * adapted
    again = blocks + adapters + attention
    # Nothing's gradient needs the last product of a block, unless an adapter follows it.
    is_adapted = "dense_4h_to_h" in job.adapted
    last = 0 if is_adapted else 2.0 * shape.num_layers * math.prod(shape.matrices["dense_4h_to_h"])
    backward = (2 if job.trains_all else 1) * (blocks + head) + 2 * adapters
    return Work(
        forward=again + head,
        backward=backward + ATTENTION_BACKWARD * attention,
        recomputed=again - last if job.gradient_checkpointing else 0.0,
    )


__all__ = ["Job", "Memory", "Shape", "Work", "count_trained", "count_work", "plan_memory"]
