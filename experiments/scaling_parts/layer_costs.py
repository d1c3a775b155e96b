"""What one layer of a model costs, counted in the code that runs: no weights, no data, any number of tokens.

The model runs on fake tensors, which have shapes and no contents. Operators are counted as they are called: their
matrix products, the bytes that they read and write, and the bytes that are saved for the backward pass. A layer is the
difference between a model of two layers and of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PretrainedConfig, PreTrainedModel, masking_utils

import hf_linattn
import hf_linattn.functional  # registers the operators
from hf_linattn.ops import precision, short_attention
from hf_linattn.ops.eva import short as short_eva

Shape = Any  # of a tensor: a sequence of integers
Operators = Counter[tuple[float, float]]


@dataclass(frozen=True)
class Architecture:
    """A model family at one size.

    config: Of the stock model. head_outputs: What the head computes per token (vocabulary), 0 for one per row.
    """

    name: str
    config: PretrainedConfig
    model: type[PreTrainedModel]
    head_outputs: int = 0

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @property
    def heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def is_causal(self) -> bool:
        return self.model is GPT2Model

    def layer_parameters(self) -> int:
        """Weights and biases of attention and feed-forward network, and two norms; learned maps add about 1 %."""
        return 12 * self.width**2 + 13 * self.width

    def parameters(self, tokens: int) -> int:
        """All parameters of a model with a position for each of the tokens."""
        return self.layers * self.layer_parameters() + (self.config.vocab_size + tokens) * self.width


def bert(name: str, **sizes: Any) -> Architecture:
    return Architecture(
        name, BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes), BertModel
    )


def gpt2(name: str, **sizes: Any) -> Architecture:
    config = GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **sizes)
    return Architecture(name, config, GPT2Model, head_outputs=config.vocab_size)


ARCHITECTURES = {
    "bert-base": bert("bert-base"),
    "bert-large": bert(
        "bert-large", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "gpt2-medium": gpt2("gpt2-medium", n_embd=1024, n_layer=24, n_head=16),
}


@dataclass(frozen=True)
class LayerCosts:
    """Of one layer and one row of so many tokens.

    forward, backward: Operators that run, each as (floating-point operations in matrix products, bytes read and
    written), and how often. saved: Bytes kept for the backward pass.
    """

    tokens: int
    forward: Operators
    backward: Operators
    saved: float

    def seconds(self, rate: float, bandwidth: float) -> float:
        """Forward and backward: every operator takes as long as its products or its memory, whatever is longer.

        rate: Floating-point operations per second. bandwidth: Bytes per second.
        """
        both = self.forward + self.backward
        return sum(count * max(flops / rate, moved / bandwidth) for (flops, moved), count in both.items())


def products(operators: Operators) -> float:
    """Floating-point operations in matrix products."""
    return sum(count * flops for (flops, _), count in operators.items())


def count_layer(
    architecture: Architecture, settings: Any, tokens: int, *, bf16: bool = True, checkpointing: bool = False
) -> LayerCosts:
    """Costs of a layer with linear attention, or softmax where `settings` is None.

    Args:
        bf16: Under autocast. checkpointing: Only inputs of layers are kept, and layers computed again.
    """
    one, two = (_count(architecture, settings, tokens, layers, bf16, checkpointing) for layers in (1, 2))
    return LayerCosts(tokens, two[0] - one[0], two[1] - one[1], two[2] - one[2])


def _count(
    architecture: Architecture, settings: Any, tokens: int, layers: int, bf16: bool, checkpointing: bool
) -> tuple[Operators, Operators, float]:
    config = type(architecture.config).from_dict(
        {**architecture.config.to_dict(), "num_hidden_layers": layers, "max_position_embeddings": tokens}
    )
    config._attn_implementation = "sdpa"
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = architecture.model(config).train()
    if settings is not None:
        model = hf_linattn.convert(model, settings)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # of old and new releases
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no two tensors get the same address
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}

    def save(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in parameters and not isinstance(x, torch.nn.Parameter):
            saved[storage._cdata] = storage.nbytes()
            kept.append(x)
        return x

    forward, backward = OperatorCounter(), OperatorCounter()
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda x: x)
    # Fake positions cannot be seen to be those of one sequence.
    one_sequence = mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)
    # The road of a GPU, not that of short inputs on a CPU.
    any_length = (
        mock.patch.object(short_attention, "suits_short", return_value=False),
        mock.patch.object(short_eva, "LONGEST", 0),
    )
    half = mock.patch.object(precision, "stays_half", _stays_half_on_a_gpu)
    with fake, one_sequence, half, any_length[0], any_length[1]:
        ids = torch.zeros(1, tokens, dtype=torch.long)
        options = {"use_cache": False} if architecture.is_causal else {}
        with forward, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16), hooks:
            output = model(input_ids=ids, **options).last_hidden_state
        held = sum(saved.values())
        with backward:
            output.sum().backward()
    return forward.found, backward.found, held


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that run within it. Views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Operators = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        changes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if made and (changes or any(t.untyped_storage()._cdata not in given for t in made)):
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            formula = FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
            self.found[float(flops), float(sum(t.numel() * t.element_size() for t in [*read, *made]))] += 1
        return result


def _stays_half_on_a_gpu(dtype: torch.dtype, device_type: str, devices: tuple[str, ...]) -> bool:
    """As `precision.stays_half` of a GPU: fake tensors on one need a PyTorch that was built for it."""
    return dtype in (torch.float16, torch.bfloat16) and "cuda" in devices


# -- matrix products of attention, which the counter does not know ----------------------------------------------------
# A backward pass multiplies the logits once more, then for values, weights, queries and keys: 5 products to 2.
BACKWARD = 2.5


def _softmax(query: Shape, key: Shape, value: Shape, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> float:
    products = query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])
    return 2.0 * products * (0.5 if is_causal else 1.0)


def _softmax_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *rest: Any, **_: Any) -> float:
    is_causal = next((z for z in rest if isinstance(z, bool)), False)
    return BACKWARD * _softmax(query, key, value, is_causal=is_causal)


def _attend(query: Shape, key: Shape, value: Shape, bias: Any, visible: Any, *_: Any, **__: Any) -> float:
    rows = max(query[0], key[0], value[0]) * max(query[1], key[1], value[1])
    return 2.0 * rows * query[2] * key[2] * (query[3] + value[3])


def _slots(query: Shape, slots: Shape, _: Shape, key: Shape, *rest: Any) -> float:
    """Queries and keys against slots: logits, and values into slots and out of them."""
    value = rest[3]
    count, dims = slots[-2], query[-1] + value[-1]
    tokens = _product(query[1:-1]) + _product(key[1:-1])
    return 2.0 * query[0] * tokens * count * dims


def _causal(*arguments: Any, **_: Any) -> float:
    query, slots, value, chunk = arguments[0], arguments[1], arguments[7], arguments[8]
    inside = query[0] * query[1] * chunk * (slots[-2] + value[-1])  # half of the pairs within chunks
    return _slots(*arguments[:8]) + inside


def _window_chunks(
    query: Shape, key: Shape, value: Shape, visible: Any, chunk_key: Shape, *_: Any, **__: Any
) -> float:
    return 2.0 * query[0] * query[1] * query[2] * (key[2] + chunk_key[1]) * (query[3] + value[3])


def _product(sizes: Shape) -> float:
    result = 1.0
    for size in sizes:
        result *= size
    return result


def _of_backward(formula: Callable[..., float]) -> Callable[..., float]:
    """The formula of a backward operator, whose first arguments are gradients of output and log-sum-exp."""
    return lambda *arguments, **options: BACKWARD * formula(*arguments[2:], **options)


def _formulas() -> dict[Any, Callable[..., float]]:
    own = torch.ops.hf_linattn
    found: dict[Any, Callable[..., float]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _softmax,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _softmax_backward,
        own.attend: _attend,
        own.blocks: lambda *a, **_: _slots(*a[:8]),
        own.causal: _causal,
        own.window_chunks: lambda *a, **_: _window_chunks(*a),
    }
    backward = {
        own.attend_backward: _of_backward(_attend),
        own.blocks_backward: _of_backward(lambda *a, **_: _slots(*a[:8])),
        own.window_chunks_backward: _of_backward(lambda *a, **_: _window_chunks(*a)),
        own.causal_backward: lambda *a, **_: (
            BACKWARD * _causal(*a[2:10], a[-1] if not isinstance(a[-1], str) else a[-2])
        ),
    }
    return {op: _of_shapes(formula) for op, formula in (found | backward).items()}


def _of_shapes(formula: Callable[..., float]) -> Callable[..., float]:
    """A formula as the counter calls it: with tensors, and the result."""

    def count(*arguments: Any, out_val: Any = None, **options: Any) -> float:
        return formula(*[tuple(z.shape) if isinstance(z, Tensor) else z for z in arguments], **options)

    return count


FORMULAS = _formulas()
