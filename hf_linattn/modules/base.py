"""`LinearAttention`: what the attention modules share. Owns all parameters and buffers; knows no Transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UncalibratedError, UnsupportedError
from ..ops.row_groups import RowGroups
from .ablation import ablated_output
from .config import AttentionConfig
from .contract import CALIBRATED_TOKENS, AttentionInputs, LayerShape, Memory
from .defaults import resolve
from .definition import C, KindDefinition
from .exactness import exact_output, is_exact, with_exact_part
from .grouped import by_groups
from .in_graph import with_tensors
from .recorded import record
from .sharded import like_sharded
from .training_place import TrainingPlace, row_noise, slot_dropout

_NOT_GROUPED = (
    "with a cache, on a grid of patches, or spread over processes. Pass use_cache=False, and one sequence or image a"
    " row with a 2-D attention_mask"
)


class LinearAttention(KindDefinition[C]):
    """Attention of one layer, `[batch, heads, tokens, head_dim]` in and out.

    Subclasses define `state_spec` (which tensors the layer has), `compute` (the pure function that uses them) and
    what else `KindDefinition` lists.

    Buffers are float32 whatever the model's dtype, and stay so under `.to(dtype)`, `.half()` and `.bfloat16()`:
    directions and statistics are constants of the estimator, not weights.
    """

    # How often buffers have got new values (`invalidate`): what was made from the old ones is of no use then.
    revision = 0
    # Whether the layer needs statistics of data and is not known to have them: known also while compiling.
    _lacks_statistics = False
    # What is taken away from the layer (`conversion/ablation.py`): a name of `ops.ablation.ABLATIONS`.
    ablation: str | None = None
    # Where training is: the random numbers of a pass follow from it (`key_noise`). `None`: torch's generator draws.
    training_place: TrainingPlace | None = None
    # What attends in place of `compute` where the tokens are a part of longer sequences (`distributed/`).
    sequence_parallel: Callable[[LinearAttention[Any], AttentionInputs], Tensor] | None = None
    # What takes this process's heads out of the tensors where they are split (`distributed/tensor_parallel.py`).
    local_heads: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    def __init__(self, config: C, shape: LayerShape) -> None:
        super().__init__()
        config = resolve(config, "decoder" if shape.is_causal else "encoder")
        self.check(config, shape)
        self.config = config
        self.shape = shape
        self.num_local_heads = shape.num_heads
        spec = self.state_spec(config, shape)
        self._state_shapes = {name: torch.Size(tensor.shape) for name, tensor in spec.items()}
        self._learned = tuple(name for name, tensor in spec.items() if tensor.learned)
        for name, tensor in spec.items():
            if tensor.learned:
                self.register_parameter(name, nn.Parameter(torch.empty(tensor.shape)))
            else:
                self.register_buffer(name, torch.empty(tensor.shape, dtype=torch.float32))
        self.reset_parameters()

    def initial_state(self) -> dict[str, Tensor]:
        """First values of all tensors: a deterministic function of (settings, shape). float32, on the CPU."""
        return {name: spec.draw() for name, spec in self.state_spec(self.config, self.shape).items()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the tensors with their first values. A no-op on the meta device."""
        own = dict(self.named_parameters(recurse=False)) | dict(self.named_buffers(recurse=False))
        if any(tensor.is_meta for tensor in own.values()):
            return
        for name, tensor in self.initial_state().items():
            own[name].copy_(tensor)
        self.invalidate()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        *,
        scaling: float | None = None,
        grid: tuple[int, int] | None = None,
        memory: Memory | None = None,
        rows: RowGroups | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[batch, heads, tokens, head_dim]`. May be shorter than `key` in a causal layer: the last queries.
            key, value: `[batch, heads, key_tokens, head_dim]`.
            key_mask: `[batch, key_tokens]` bool, True where a token is real.
            scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
            grid: Height and width in patches, when the tokens after the global ones are an image.
            memory: What the layer (a causal one) has seen before: all arguments are then those of new tokens alone,
                which become part of it.
            rows: The sequences of the batch, several in a row or padded, in groups that are computed one by one; in
                place of `key_mask`.
        Returns: `[batch, heads, tokens, head_dim]`, dtype of `query`; zeros for queries that are padding.
        """
        if self._lacks_statistics:
            self._check_calibrated()
        if query.shape[1] != self.num_local_heads:
            raise UnsupportedError(
                f"Layer {self.shape.layer_idx} ({self.kind}) attends with {self.num_local_heads} heads; got queries"
                f" with {query.shape[1]}. Where tensor parallelism splits the heads, call"
                " hf_linattn.distributed.tensor_parallel.split_heads(model, mesh)."
            )
        inputs = AttentionInputs(
            query,
            key,
            value,
            key_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            is_causal=self.shape.is_causal,
            grid=grid,
            training=self.training,
            noise=row_noise(self, query, rows) if self.training and self.config.is_random else None,
            rows=rows,
        )
        if rows is not None and (memory is not None or grid is not None or self.sequence_parallel is not None):
            raise UnsupportedError(f"Sequences in groups cannot be read {_NOT_GROUPED}.")
        if self.sequence_parallel is not None and (memory is not None or self.ablation is not None):
            instead = "Pass use_cache=False" if memory is not None else "Leave ablated(...)"
            raise UnsupportedError(f"A sequence that is spread over processes is read as a whole. {instead}.")
        if self.ablation is not None:
            if memory is not None:
                raise UnsupportedError(
                    f"Within ablated(model, {self.ablation!r}) a model reads whole sequences: pass use_cache=False."
                )
            output = ablated_output(self, inputs)
        elif self.sequence_parallel is not None:
            output = self.sequence_parallel(self, inputs)
        elif memory is None:
            output = self.compute_or_record(self.config, self.tensors(), inputs)
        else:
            output = memory.attend(self, inputs)
        return self.in_training(output) if self.training and torch.is_grad_enabled() else output

    @staticmethod
    def call_options(config: AttentionConfig, inputs: AttentionInputs) -> dict[str, Any]:
        """The keyword arguments that the attention functions of all kinds share."""
        dropout = config.slot_dropout if inputs.training else 0.0
        return {
            "key_mask": inputs.key_mask,
            "real_first": inputs.real_first,
            "scaling": inputs.scaling,
            "is_causal": inputs.is_causal,
            "window_size": config.window_size or 0,
            "overlap_window": config.overlap_window,
            "grid": inputs.grid,
            "num_global_tokens": config.num_global_tokens or 0,
            "slot_dropout": slot_dropout(dropout, inputs) if dropout else 0.0,
        }

    @classmethod
    def compute_or_exact(cls, config: C, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        """`compute`, or softmax attention where the input is short: all of it, or some rows or queries."""
        window = (config.window_size or 0) * (2 if config.overlap_window else 1) + (config.num_global_tokens or 0)
        # A look at the length first, which is too large as a rule.
        if inputs.key.shape[2] <= max(window, config.exact_below) or inputs.grid is not None:
            if is_exact(cls, config, inputs):
                return exact_output(config, state, inputs)
        output = cls.compute(config, state, inputs)
        return with_exact_part(output, config, state, inputs) if config.exact_below else output

    @classmethod
    def compute_or_record(cls, config: C, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        """`compute_or_exact`, or one operator that does it where the call is recorded; for each group of rows."""
        if inputs.rows is not None:
            return by_groups(partial(cls.compute_or_record, config, state), inputs, inputs.rows)
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return record(config, state, inputs)
        return cls.compute_or_exact(config, state, inputs)

    def takes_rows(self, grid: tuple[int, int] | None) -> bool:
        """Whether sequences may come to the layer in groups (`rows` of `forward`)."""
        return grid is None and self.sequence_parallel is None

    def in_training(self, output: Tensor) -> Tensor:
        """The output of a training pass, with every learned tensor in its graph, as distributed training needs it.

        Short rows are softmax attention, without any.
        """
        if not self._learned:
            return output
        return with_tensors(output, [getattr(self, name) for name in self._learned])

    def tensors(self, *, all_heads: bool = False) -> dict[str, Tensor]:
        """The tensors that `state_spec` names, each as the attribute it is.

        Where heads are split over processes, those of this one's heads, unless `all_heads`.

        Not as registered parameters and buffers: a replica of DataParallel, FSDP with flat parameters, `prune` and
        `parametrize` take those away and leave a tensor under the name.

        Raises: `UnsupportedError` if one is missing, or is a part of what it has to be.
        """
        found: dict[str, Tensor] = {}
        for name, shape in self._state_shapes.items():
            tensor = getattr(self, name, None)
            if not isinstance(tensor, Tensor) or tensor.shape != shape:
                raise UnsupportedError(self._not_whole(name, tensor))
            found[name] = tensor
        return found if all_heads or self.local_heads is None else self.local_heads(found)

    def _not_whole(self, name: str, tensor: Any) -> str:
        has = f"of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"({tensor!r})"
        return (
            f"Layer {self.shape.layer_idx} ({self.kind}) needs its tensor {name!r} of shape"
            f" {tuple(self._state_shapes[name])}; got one {has}. A library that replaces or shards parameters (FSDP,"
            " pruning, adapters) has to put the whole tensor back before the layer is called: call the model through"
            " the wrapper, or leave the modules named 'linattn' out of it."
        )

    @torch.no_grad()
    def set_tensors(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite some tensors in place, as after a calibration. Raises `InputError` for one that does not fit."""
        own = self.tensors(all_heads=True)
        for name, value in values.items():
            if name not in own or own[name].shape != value.shape:
                raise InputError(
                    f"{type(self).__name__} has no tensor {name!r} of shape {tuple(value.shape)}; it has"
                    f" { {name: tuple(tensor.shape) for name, tensor in own.items()} }."
                )
            own[name].copy_(like_sharded(value, own[name]))
        self.invalidate()

    def invalidate(self) -> None:
        """To be called when buffers have got other values: what was made from the old ones is not used any more."""
        self.revision += 1
        self._lacks_statistics = not self.is_calibrated

    @property
    def is_calibrated(self) -> bool:
        """Whether the layer has the statistics it needs (True if it needs none). May read a value."""
        count = self._buffers.get(CALIBRATED_TOKENS)
        return count is None or (not count.is_meta and bool(count))

    def _check_calibrated(self) -> None:
        """Raises `UncalibratedError`. Reads a value: only until the layer is known to be calibrated."""
        count = self._buffers.get(CALIBRATED_TOKENS)
        if count is None or count.is_meta:
            return
        compiling = torch.compiler.is_compiling()
        if compiling or not self.is_calibrated:
            raise UncalibratedError(
                f"Layer {self.shape.layer_idx} ({self.kind}) needs statistics of data and has none yet. Call"
                " hf_linattn.calibrate(model, batches) with some batches of typical inputs first."
                + (" (If its buffers were set by hand, run the model once before compiling it.)" if compiling else "")
            )
        self._lacks_statistics = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.invalidate()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearAttention:
        # `.to(bfloat16)` and friends go through here: let buffers follow the device but keep their float32 values.
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        fields: dict[str, Any] = self.config.to_dict()
        return ", ".join(f"{k}={v!r}" for k, v in fields.items()) + f", {self.shape}"
