"""Calibration of LARA's proposals: a sample of what randomized attention's own proposals are on data, then k-means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import InputError
from ...ops.favor.random_features import derive_seed
from ...ops.inputs import scale_inputs
from ...ops.lara.features import mixture_log_ratio
from ...ops.lara.kmeans import kmeans
from ...ops.lara.randomized import proposal_key_mean
from ..config import AttentionConfig
from ..contract import CALIBRATED_TOKENS, AttentionInputs, LayerShape

SAMPLE_SIZE = 4096
# Queries whose weights over the keys exist at the same time.
_QUERIES_AT_ONCE = 256


class ProposalCalibration:
    """Keeps a uniform sample, of fixed size, of the means `x_t + sum_n softmax_n(x_t . y_n) y_n` of all tokens seen.

    Every token draws a random priority and the largest ones stay, so the union of two samples is again one: of all
    tokens of both. The positions are the same for all heads. Memory is O(points * heads * head_dim), on the CPU.

    Args:
        num_landmarks: How many proposals are sought.
        config, shape: Of the layer.
        stream: The process's rank: ranks must not draw the same priorities.
        first_row: The number of the first row among those of all processes. Priorities are then those of the rows,
            and the sample that of one process with all rows. `None`: they follow from `stream`.
    """

    def __init__(
        self,
        num_landmarks: int,
        config: AttentionConfig,
        shape: LayerShape,
        stream: int = 0,
        first_row: int | None = None,
    ) -> None:
        self._num_landmarks, self._config, self._shape = num_landmarks, config, shape
        size = max(SAMPLE_SIZE, 16 * num_landmarks)
        self._points = torch.zeros(shape.num_heads, size, shape.head_dim)
        self._priorities = torch.full((size,), float("-inf"), dtype=torch.float64)
        self._seen = torch.zeros(1, dtype=torch.int64)
        self._broken = torch.zeros(1, dtype=torch.int64)
        seed = derive_seed(config.seed, shape.layer_idx, "lara-sample", stream)
        self._generator = torch.Generator(device="cpu").manual_seed(seed)
        self._row = first_row

    @torch.no_grad()
    def update(self, inputs: AttentionInputs) -> None:
        """Take in one batch; padding does not count."""
        mask = inputs.key_mask
        for row in range(inputs.key.shape[0]):
            if self._row is not None:
                seed = derive_seed(self._config.seed, self._shape.layer_idx, "lara-sample-row", self._row)
                self._generator.manual_seed(seed)
                self._row += 1
            real = torch.ones_like(inputs.key[row, 0, :, 0], dtype=torch.bool) if mask is None else mask[row]
            places = real.nonzero().squeeze(-1)[self._config.num_global_tokens or 0 :]  # slots hold the others
            # Queries may be fewer than keys: they are the last ones.
            skipped = inputs.key.shape[2] - inputs.query.shape[2]
            asked = (places >= skipped).nonzero().squeeze(-1)
            if asked.numel():
                query = inputs.query[row : row + 1, :, places[asked] - skipped]
                self._take(query, inputs.key[row : row + 1, :, places], asked, inputs)

    def _take(self, query: Tensor, key: Tensor, positions: Tensor, inputs: AttentionInputs) -> None:
        """`query` `[1, heads, queries, dim]` stands at `positions` of `key` `[1, heads, keys, dim]`."""
        count = positions.numel()
        priorities = torch.rand(count, generator=self._generator, dtype=torch.float64)
        self._seen += count
        kept = torch.cat([self._priorities, priorities]).topk(self._priorities.numel()).indices
        entering = (kept[kept >= self._priorities.numel()] - self._priorities.numel()).sort().values
        if not entering.numel():
            return
        chosen = entering.to(query.device)
        x, y = scale_inputs(query[:, :, chosen].float(), key.float(), inputs.scaling)
        positions = positions[chosen]
        means = []
        for part, at in zip(x.split(_QUERIES_AT_ONCE, 2), positions.split(_QUERIES_AT_ONCE), strict=True):
            numbers = torch.arange(y.shape[2], device=y.device)
            visible = numbers <= at[:, None] if inputs.is_causal else None
            means.append((part + proposal_key_mean(part, y, visible)).squeeze(0))
        points = torch.cat(means, dim=1).cpu()
        # Told by `result`: a process that raised here would leave the others waiting for its state.
        self._broken += int((~points.isfinite().all(-1).all(0)).sum())
        self._keep(torch.cat([self._points, points], dim=1), torch.cat([self._priorities, priorities[entering]]))

    def _keep(self, points: Tensor, priorities: Tensor) -> None:
        best = priorities.sort(descending=True, stable=True).indices[: self._priorities.numel()]
        self._points, self._priorities = points[:, best], priorities[best]

    def state(self) -> dict[str, Tensor]:
        """The sample (`-inf` as priority of empty places), and the numbers of tokens seen and of those not finite."""
        return {
            "points": self._points,
            "priorities": self._priorities,
            "tokens": self._seen,
            "broken": self._broken,
        }

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """The sample of the tokens of all `states`."""
        self._keep(torch.cat([s["points"] for s in states], dim=1), torch.cat([s["priorities"] for s in states]))
        self._seen = torch.stack([s["tokens"] for s in states]).sum(0)
        self._broken = torch.stack([s["broken"] for s in states]).sum(0)

    def result(self) -> dict[str, Tensor]:
        """The layer's `centroids`, or learned proposals that start there, and `calibrated_tokens`.

        Raises: `InputError` for fewer tokens than centroids, for equal ones, and for some that are not finite.
        """
        points, layer = self._points[:, self._priorities > float("-inf")], self._shape.layer_idx
        needed = self._num_landmarks
        if int(self._broken):
            raise InputError(
                f"The queries or keys of the calibration data are not all finite (inf or NaN) in layer {layer}."
            )
        if points.shape[1] < needed:
            raise InputError(
                f"Calibrating {needed} proposals needs at least as many real tokens (beside global"
                f" ones); got {points.shape[1]}. Pass more batches (some tens of thousands of tokens), or set a"
                " smaller num_landmarks."
            )
        spread = (points - points[:, :1]).abs().amax()
        if needed > 1 and bool(spread <= 16 * torch.finfo(points.dtype).eps * points.abs().amax()):
            raise InputError(
                f"All {points.shape[1]} tokens of the calibration data are equal in layer {layer}: there is nothing to"
                " take proposals from. Calibrate with typical inputs."
            )
        seed = derive_seed(self._config.seed, layer, "lara-kmeans")
        centroids = kmeans(points, needed, seed=seed)
        calibrated = {CALIBRATED_TOKENS: self._seen.sum().float()}
        if not self._config.learned:
            return {"centroids": centroids, **calibrated}
        _, mixture = mixture_log_ratio(centroids, centroids)
        start = {"query_directions": centroids, "key_directions": centroids, "slot_bias": -mixture}
        return {**start, **calibrated}
