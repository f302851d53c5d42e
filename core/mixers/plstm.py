"""pLSTM's layer for grids: a linear recurrence from each of the four corners, whose gates choose where states go.

    q, k, v = W x + b;   S, T, M, D from x, for each head and corner
    y = outprojection(norm(grid_scan(q, k, v, S, T, M, D)))

Gates of propagation (mode P), where states walk in a direction, α to the right and 1 - α down:

    α = σ(b + w·x / 2 dim);   λ = tanh(5 (b + w·x))
    S = (α σ(s), 1 - α σ(s));   T = ((α λ, α λ), (1 - α λ, 1 - α λ));   M = σ(m) for both edges

Gates of diffusion (mode D), where a state reaches every cell ahead, turning once:

    S = (σ(s_r), σ(s_d));   T = ((λ_r, λ_rd), (0, λ_d));   M = (σ(m_l), σ(m_u))

Models alternate them. A gate of a head and corner reads a slice of x of its own, dim / 4H wide; D = σ(b) is a constant.

Without a grid the tokens are one row.

Source: Pöppel et al., "pLSTM: parallelizable Linear Source Transition Mark networks" (arXiv 2506.11997), sections 3 and
4; names of parameters as in the torch code of ml-jku/plstm. Two things differ from that code. In mode P, λ < 0 makes
states grow along their walk, as |α λ| + |1 - α λ| > 1: λ is at least 0 here unless `stable=False`. And
`orientation_bias` and `orientation_weight` belong to [corner, head], as their shape says, where that code reads their
flat order as [head, corner]: its tensors come here as `t.reshape(H, 4, …).transpose(0, 1)`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import checks, norms
from sinuous.core.checks import check_choice
from sinuous.core.mixers.contract import Mixer, register_mixer
from sinuous.core.ops.operators import operators

CORNERS = 4

TRANSITION_FACTOR = 5.0
"""Factor of the argument of tanh: with the bias of 1 at the start, λ = 0.9999."""


def small_(t: Tensor) -> None:
    """Draw from N(0, 2 / (5 n)), n the last side of t."""
    nn.init.normal_(t, std=(2 / (5 * t.shape[-1])) ** 0.5)


def _of_slices(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear map `[…, dim]` to gates `[…, H, 4]`, each of which reads its own slice of x."""
    weight = weight.flatten(0, -2)
    values = (x.unflatten(-1, [weight.shape[0], weight.shape[1]]) * weight).sum(-1)
    gates: Tensor = norms.at_least_fp32(values + bias.flatten()).unflatten(-1, [-1, 4])
    return gates


class Gate(nn.Module):
    """Source or mark: the sigmoid of a linear map."""

    def __init__(self, dim: int, num_heads: int, dd: dict[str, Any]) -> None:
        super().__init__()
        gates = CORNERS * num_heads
        self.bias = nn.Parameter(torch.empty(gates, 1, 1, 1, **dd))
        self.weight = nn.Parameter(torch.empty(1, gates, 1, 1, 1, dim // gates, **dd))

    def init_weights(self, weights: bool) -> None:
        nn.init.constant_(self.bias, -4.0)
        nn.init.zeros_(self.weight)
        if weights:
            small_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(_of_slices(x, self.weight, self.bias))


class Transition(nn.Module):
    """Transition gate, λ = tanh(5 (b + w·x))."""

    def __init__(self, dim: int, num_heads: int, dd: dict[str, Any]) -> None:
        super().__init__()
        gates = CORNERS * num_heads
        self.factor = TRANSITION_FACTOR
        self.eigenvalues_bias = nn.Parameter(torch.empty(gates, 1, **dd))
        self.eigenvalues_weight = nn.Parameter(torch.empty(1, gates, 1, dim // gates, **dd))

    def init_weights(self, weights: bool) -> None:
        nn.init.ones_(self.eigenvalues_bias)
        nn.init.zeros_(self.eigenvalues_weight)
        if weights:
            small_(self.eigenvalues_weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.factor * _of_slices(x, self.eigenvalues_weight, self.eigenvalues_bias))


class Direct(nn.Module):
    """Direct gate, D = σ(b), `[H]`."""

    def __init__(self, num_heads: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(num_heads, 1, 1, 1, 1, **dd))

    def init_weights(self) -> None:
        nn.init.constant_(self.bias, -6.0)

    def forward(self) -> Tensor:
        return torch.sigmoid(norms.at_least_fp32(self.bias)).flatten()


class HeadProjection(nn.Module):
    """Linear layer to the heads, `[…, dim]` to `[…, H, dim / H]`."""

    def __init__(self, dim: int, num_heads: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, dim // num_heads, 1, 1, dim, **dd))
        self.bias = nn.Parameter(torch.empty(num_heads, dim // num_heads, 1, **dd))

    def init_weights(self) -> None:
        small_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        heads, width = self.weight.shape[:2]
        y: Tensor = F.linear(x, self.weight.flatten(0, 3), self.bias.flatten()).unflatten(-1, [heads, width])
        return y


@register_mixer("plstm_grid")
class PLSTMGrid(Mixer):
    """pLSTM's layer for grids.

    Args:
        dim: width of the model.
        num_heads: H; a head per 64 channels if absent, at least one.
        mode: `"P"`, propagation, or `"D"`, diffusion.
        chirality: turn that is open in mode D: `"L"`, from up to right, or `"R"`, from left to down.
        gate_weights: gates depend on the input from the start, as in the models for ImageNet; else their weights start
            at 0, as in the arrow-pointing task.
        stable: in mode P, λ ≥ 0, which keeps states bounded.
        eps: added under the root of the norm.

    Raises:
        ValueError: if `dim` is no multiple of 4 `num_heads`, or `mode` or `chirality` is unknown.
    """

    causal: ClassVar[bool] = False
    constant_state: ClassVar[bool] = False
    reads_grid: ClassVar[bool] = True
    __constants__ = ["propagates"]  # so that TorchScript leaves the branch of the other mode alone

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        mode: str = "P",
        chirality: str = "L",
        gate_weights: bool = True,
        stable: bool = True,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        heads = max(1, dim // 64) if num_heads is None else num_heads
        if heads < 1 or dim % (CORNERS * heads):
            raise ValueError(f"dim must be a multiple of 4 num_heads (got dim {dim} and {heads} heads)")
        check_choice("mode", mode, ("P", "D"))
        check_choice("chirality", chirality, ("L", "R"))
        self.propagates = mode == "P"
        self.left_turns, self.gate_weights = chirality == "L", gate_weights
        self.smallest = 0.0 if stable else -1.0
        if self.propagates:
            self.orientation_bias = nn.Parameter(torch.empty(CORNERS, heads, **dd))
            self.orientation_weight = nn.Parameter(torch.empty(CORNERS, heads, dim, **dd))
            self.source = Gate(dim, heads, dd)
            self.transition = Transition(dim, heads, dd)
            self.mark = Gate(dim, heads, dd)
        else:
            self.source_r, self.source_d = Gate(dim, heads, dd), Gate(dim, heads, dd)
            self.transition_r, self.transition_d = Transition(dim, heads, dd), Transition(dim, heads, dd)
            self.transition_rd = Transition(dim, heads, dd)
            self.mark_l, self.mark_u = Gate(dim, heads, dd), Gate(dim, heads, dd)
        self.direct = Direct(heads, dd)
        self.query, self.key, self.value_ = (HeadProjection(dim, heads, dd) for _ in range(3))
        self.mhnorm = norms.MultiHeadRMSNorm(heads, dim // heads, eps, **dd)
        self.outprojection = nn.Linear(dim, dim, bias=False, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        if self.propagates:
            heads = self.orientation_bias.shape[1]
            with torch.no_grad():  # a single head walks the diagonal
                self.orientation_bias.copy_(torch.linspace(-2, 2, heads) if heads > 1 else torch.zeros(1))
            nn.init.zeros_(self.orientation_weight)
            if self.gate_weights:
                small_(self.orientation_weight)
        for layer in self.children():
            if isinstance(layer, (Gate, Transition)):
                layer.init_weights(self.gate_weights)
            elif isinstance(layer, (Direct, HeadProjection)):
                layer.init_weights()
        self.mhnorm.reset_parameters()
        small_(self.outprojection.weight)

    def output_weights(self) -> set[str]:
        return {"outprojection.weight"}

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("bias", "scale"))}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        """Mix the cells of a grid, or rows of tokens.

        Args:
            x: `[B, T, dim]`, the cells row by row; packed sequences are `[1, ΣT, dim]` with `cu_seqlens`.
            cu_seqlens: boundaries of packed sequences; each is a row.
            grid: (height, width), height · width = T; a single row if absent.

        Raises:
            ValueError: if the grid has another number of cells than there are tokens, or the sequences are packed.
        """
        if grid is not None:
            checks.check_grid(grid, x.shape[1], cu_seqlens, axes=2)
            cells = x.unflatten(1, [grid[0], grid[1]])
        else:
            cells = x.unsqueeze(1)
        source, transition, mark = self._gates(cells)
        v = self.value_(cells)
        direct = self.direct().expand(v.shape[:4])
        scanned = [self.query(cells), self.key(cells), v, source, transition, mark, direct]
        y = _scan(scanned) if cu_seqlens is None else _scan_packed(scanned, cu_seqlens)
        out: Tensor = self.outprojection(self.mhnorm(y).flatten(3).flatten(1, 2))
        return out

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute source `[…, H, 4, 2]`, transition `[…, H, 4, 2, 2]` and mark `[…, H, 4, 2]`."""
        if self.propagates:
            tilt = torch.einsum("ohd,...d->...ho", self.orientation_weight, x) / (2 * x.shape[-1])
            alpha = torch.sigmoid(norms.at_least_fp32(tilt + self.orientation_bias.mT))
            right = alpha * self.source(x)
            ahead = alpha * self.transition(x).clamp(min=self.smallest)
            row = torch.stack([ahead, ahead], -1)
            mark = self.mark(x)
            return torch.stack([right, 1 - right], -1), torch.stack([row, 1 - row], -2), torch.stack([mark, mark], -1)
        turn = self.transition_rd(x)
        closed = torch.zeros_like(turn)
        up_right, left_down = (turn, closed) if self.left_turns else (closed, turn)
        rows = [
            torch.stack([self.transition_r(x), up_right], -1),
            torch.stack([left_down, self.transition_d(x)], -1),
        ]
        source = torch.stack([self.source_r(x), self.source_d(x)], -1)
        return source, torch.stack(rows, -2), torch.stack([self.mark_l(x), self.mark_u(x)], -1)


def _scan(tensors: list[Tensor]) -> Tensor:
    q, k, v, source, transition, mark, direct = tensors
    return operators.grid_scan(q, k, v, source, transition, mark, direct, orientations=[0, 1, 2, 3])[0]


def _scan_packed(tensors: list[Tensor], cu_seqlens: Tensor) -> Tensor:
    """Scan packed sequences in one row, `[1, 1, T, …]`; sequences of one length are a batch.

    Gates of 0 where sequences touch would need fewer calls, but 0 times NaN is NaN.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    sizes: list[int] = torch.unique(lengths[lengths > 0]).tolist()
    batches = [starts[lengths == n].unsqueeze(1) + torch.arange(n, device=starts.device) for n in sizes]
    if len(batches) == 0:
        return tensors[2]
    order = torch.cat([steps.flatten() for steps in batches])
    # One gather of all batches and not one for each, whose gradients would each be as long as the row.
    cut = [t[0, 0].index_select(0, order).split([steps.numel() for steps in batches]) for t in tensors]
    outputs: list[Tensor] = []
    for i, steps in enumerate(batches):
        rows = [parts[i].unflatten(0, [steps.shape[0], 1, steps.shape[1]]) for parts in cut]
        outputs.append(_scan(rows).flatten(0, 2))
    return torch.cat(outputs).index_select(0, order.argsort()).unsqueeze(0).unsqueeze(0)
