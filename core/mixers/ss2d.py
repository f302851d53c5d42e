"""SS2D: four selective scans over a grid, by rows and by columns from either end, summed.

    x, z = in_proj(u);   x = silu(conv2d(x))                 depthwise, each cell with its neighbours
    Δ, B, C = W_k x                                          for each route k; Δ of rank R, raised to E
    y = Σ_k S6_k(x along route k), each brought back to the cells
    out = out_proj(norm(y) ⊙ silu(z))

The four routes are two and their reverses, each with its own A, D, Δ, B and C: rows and columns (`"cross"`, VMamba), or
both as serpentines, whose steps all go from a cell to a neighbour (`"serpentine"`, LaMamba-Diff). A route and its
reverse read the same sequence. So there are two sequences, scanned side by side, once from their beginning and once
from their end.

Without a grid the tokens are one row: the convolution keeps the middle row of its filter, and rows and columns are the
same order.

Sources: Liu et al., "VMamba: Visual State Space Model" (arXiv 2401.10166), sections 4.2 and 4.3; names of parameters as
in MzeroMiko/VMamba. Fu, Chen and Yu, "LaMamba-Diff" (arXiv 2408.02615), section 3.2.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import checks, norms
from sinuous.core.checks import check_choice, check_sizes
from sinuous.core.mixers.contract import Mixer, register_mixer
from sinuous.core.mixers.convolutions import centred_conv1d, check_centred
from sinuous.core.mixers.decay_init import init_A_log_s4d_real, init_dt_bias
from sinuous.core.ops.operators import operators
from sinuous.core.scan_routes import CROSS, sum_to_cells, to_cells, to_sequence, to_sequences

ROUTES = len(CROSS)

ORDERS = {"cross": CROSS[:2], "serpentine": ("serpentine", "column_serpentine")}
"""The two routes of each kind. Parameters are stacked as VMamba and LaMamba-Diff have them: for `cross` the two, then
their reverses; for `serpentine` each beside its reverse."""


@register_mixer("ss2d")
class SS2D(Mixer):
    """VMamba's mixer.

    Args:
        dim: width of the model.
        d_state: N, size of the state per channel and route; 16 in the first models, 1 in the later ones.
        d_conv: side of the convolution's filter, odd and at most 15.
        expand: E / dim.
        dt_rank: R; `None` is ceil(dim / 16).
        gate: multiply by silu(z); the later models do not.
        bias: in the projections; conv_bias: in the convolution.
        routes: `"cross"` or `"serpentine"`.

    Raises:
        ValueError: if a size is less than 1, `d_conv` is even or too large, or there are no such routes.
    """

    causal: ClassVar[bool] = False
    constant_state: ClassVar[bool] = False
    reads_grid: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 3,
        expand: float = 2,
        dt_rank: int | None = None,
        gate: bool = True,
        bias: bool = False,
        conv_bias: bool = True,
        routes: str = "cross",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        check_sizes(dim=dim, d_state=d_state, d_inner=inner, dt_rank=rank)
        check_centred(d_conv)
        check_choice("routes", routes, ORDERS)
        self.routes = routes
        self.d_inner, self.d_state, self.rank, self.gate = inner, d_state, rank, gate
        self.in_proj = nn.Linear(dim, inner * (2 if gate else 1), bias=bias, **dd)
        self.conv2d = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias, **dd)
        self.x_proj_weight = nn.Parameter(torch.empty(ROUTES, rank + 2 * d_state, inner, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(ROUTES, inner, rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(ROUTES, inner, **dd))
        self.A_logs = nn.Parameter(torch.empty(ROUTES * inner, d_state, **dd))
        self.Ds = nn.Parameter(torch.empty(ROUTES * inner, **dd))
        self.out_norm = norms.LayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        for layer in (self.in_proj, self.conv2d, self.out_norm, self.out_proj):
            layer.reset_parameters()
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(self.rank**-0.5), self.rank**-0.5)
        init_dt_bias(self.dt_projs_bias)
        init_A_log_s4d_real(self.A_logs)
        nn.init.ones_(self.Ds)

    def output_weights(self) -> set[str]:
        return {"out_proj.weight"}

    def no_weight_decay(self) -> set[str]:
        return {"A_logs", "Ds"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        """Mix the cells of a grid, or rows of tokens.

        Args:
            x: `[B, T, dim]`, the cells row by row; packed sequences are `[1, ΣT, dim]` with `cu_seqlens`.
            cu_seqlens: boundaries of packed sequences; each is a row.
            grid: (height, width), height · width = T; a single row if absent.

        Raises:
            ValueError: if the grid has another number of cells than there are tokens, or the sequences are packed.
        """
        x = self.in_proj(x)
        z = x[..., self.d_inner :]
        x = x[..., : self.d_inner]
        if grid is None:
            middle = self.conv2d.weight[:, 0, self.conv2d.weight.shape[2] // 2]
            x = F.silu(centred_conv1d(x, middle, self.conv2d.bias, cu_seqlens))
            y = self._scan(torch.stack([x, x], 2), cu_seqlens).sum(2)
        else:
            checks.check_grid(grid, x.shape[1], cu_seqlens, axes=2)
            height, width = grid
            if height * width > 0:  # torch's convolution refuses an image without a pixel
                # Cells stay rows of their channels, which oneDNN convolves four times as fast as if it rearranged them.
                maps = x.unflatten(1, [height, width]).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
                x = F.silu(self.conv2d(maps).permute(0, 2, 3, 1).flatten(1, 2))
            if self.routes == "cross":
                rows, columns = to_sequence(x, "raster", height, width), to_sequence(x, "column", height, width)
                y = self._scan(torch.stack([rows, columns], 2), None)
                y = to_cells(y[:, :, 0], "raster", height, width) + to_cells(y[:, :, 1], "column", height, width)
            elif torch.jit.is_scripting():  # type: ignore[attr-defined]
                raise ValueError("TorchScript has only the routes cross; compile or export instead")
            else:
                y = self._scan(to_sequences(x, ORDERS[self.routes], height, width), None)
                y = sum_to_cells(y, ORDERS[self.routes], height, width)
        y = self.out_norm(norms.at_least_fp32(y)).to(x.dtype)
        out: Tensor = self.out_proj(y * F.silu(z) if self.gate else y)
        return out

    def _scan(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Scan both sequences `[B, T, 2, E]` from either end, and sum the two."""
        weights = self.x_proj_weight.unflatten(0, [2, 2])  # by sequence and end, or the other way round
        weights = weights.transpose(0, 1) if self.routes == "cross" else weights
        projected = torch.einsum("btkd,kecd->btkec", x, weights)
        from_beginning = self._scan_from(x, projected[:, :, :, 0], 0, cu_seqlens)
        return from_beginning + self._scan_from(x, projected[:, :, :, 1], 1, cu_seqlens)

    def _scan_from(self, x: Tensor, projected: Tensor, end: int, cu_seqlens: Tensor | None) -> Tensor:
        """Scan both sequences from their beginning or, for `end` 1, from their end, by Δ, B and C of them,
        `[B, T, 2, R + 2N]`."""
        dt, B, C = projected.split([self.rank, self.d_state, self.d_state], -1)
        dt = self._raised(dt, self._of_end(self.dt_projs_weight, end))
        A_logs = self._of_end(self.A_logs.unflatten(0, [-1, self.d_inner]), end).flatten(0, 1)
        y, _, _ = operators.selective_scan(
            x.flatten(2).to(dt.dtype), dt, -torch.exp(norms.at_least_fp32(A_logs)), B, C,
            D=self._of_end(self.Ds.unflatten(0, [-1, self.d_inner]), end).flatten(),
            dt_bias=self._of_end(self.dt_projs_bias, end).flatten(), cu_seqlens=cu_seqlens, reverse=end == 1,
        )  # fmt: skip
        both: Tensor = y.unflatten(-1, [2, self.d_inner])
        return both

    def _raised(self, dt: Tensor, weights: Tensor) -> Tensor:
        """Δ of rank R `[B, T, 2, R]` raised to the width, `[B, T, 2E]`."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return torch.einsum("btkr,kdr->btkd", dt, weights).flatten(2)
        else:
            traced = torch.compiler.is_compiling() or not isinstance(dt, Tensor)
            if traced or torch.is_grad_enabled() or dt.dtype != weights.dtype:
                return torch.einsum("btkr,kdr->btkd", dt, weights).flatten(2)
            # Batched products lie behind one another, and would be copied to lie side by side.
            raised = dt.new_empty(dt.shape[0] * dt.shape[1], 2, self.d_inner)
            torch.bmm(dt.flatten(0, 1).transpose(0, 1), weights.mT, out=raised.transpose(0, 1))
            return raised.view(dt.shape[0], dt.shape[1], 2 * self.d_inner)

    def _of_end(self, parameters: Tensor, end: int) -> Tensor:
        """Of parameters stacked by route, those of the two sequences' scans from their beginning or from their end."""
        return parameters[2 * end : 2 * end + 2] if self.routes == "cross" else parameters[end::2]
