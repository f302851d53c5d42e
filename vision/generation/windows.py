"""Attention in windows of a map, with learned biases of relative place, as Swin has it; for maps of any sides.

Source: Liu et al., "Swin Transformer" (arXiv 2103.14030), section 3.2; names of parameters as in
microsoft/Swin-Transformer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.patches import resize_pos_embed
from sinuous.core.scan_routes import keeps_tensors

Sides = tuple[int, int]

_CUT = -100.0  # what Swin adds between regions of a shifted window


class WindowAttention(nn.Module):
    """Attention among the cells of each window of a map `[B, H, W, dim]`, with learned biases of relative place.

    A side that is no longer than a window is one window. A side that is longer and no multiple of it is padded, which
    no cell sees.

    Args:
        dim: width.
        num_heads: of attention.
        window_size: side of a window.
        sides: of the map that the table of biases is made for; it is resampled where windows are of another size.
        shifted: windows begin half a window further on, round the edges of the map.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, sides: Sides, shifted: bool) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.shifted = num_heads, window_size, shifted
        self.table_sides = table_sides(sides, window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(math.prod(self.table_sides), num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        window = (min(self.window_size, height), min(self.window_size, width))
        pairs = zip(window, (height, width), strict=True)
        shift = [side // 2 if self.shifted and whole > side else 0 for side, whole in pairs]
        below, beside = -height % window[0], -width % window[1]
        if below or beside:
            x = F.pad(x, (0, 0, 0, beside, 0, below))
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        rows, columns = x.shape[1] // window[0], x.shape[2] // window[1]
        cells = x.unflatten(2, [columns, window[1]]).unflatten(1, [rows, window[0]]).transpose(2, 3)
        cells = cells.reshape(batch * rows * columns, window[0] * window[1], dim)
        q, k, v = self.qkv(cells).unflatten(-1, [3, self.num_heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self._bias(window).unsqueeze(0)
        if any(shift) or below or beside:
            mask = _kept_mask if keeps_tensors(x) else _mask
            apart = mask((height, width), window, (shift[0], shift[1]), (below, beside), x.device)
            bias = (bias + apart.unsqueeze(1)).expand(batch, -1, -1, -1, -1).flatten(0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        y = self.proj(y.transpose(1, 2).flatten(2))
        y = y.view(batch, rows, columns, *window, dim).transpose(2, 3).reshape(x.shape)
        if any(shift):
            y = y.roll((shift[0], shift[1]), (1, 2))
        inside: Tensor = y[:, :height, :width]
        return inside

    def _bias(self, window: Sides) -> Tensor:
        """Biases `[num_heads, N, N]` of the N cells of a window: of a and c, the entry a - c of the table."""
        sides = [2 * window[0] - 1, 2 * window[1] - 1]
        table = resampled(self.relative_position_bias_table.unflatten(0, self.table_sides), sides)
        placed = table.unfold(0, window[0], 1).unfold(1, window[1], 1).flip(3, 4)
        bias: Tensor = placed.permute(2, 0, 1, 3, 4).flatten(3, 4).flatten(1, 2)
        return bias


def table_sides(sides: Sequence[int], window_size: int) -> Sides:
    """Sides of the table of relative biases for a map of these sides."""
    return 2 * min(window_size, sides[0]) - 1, 2 * min(window_size, sides[1]) - 1


def resampled(table: Tensor, sides: Sequence[int]) -> Tensor:
    """A table `[h, w, D]` at other sides, bicubically."""
    if list(table.shape[:2]) == list(sides):
        return table
    rows = resize_pos_embed(table.flatten(0, 1)[None], list(table.shape[:2]), list(sides), "none")
    fitted: Tensor = rows[0].unflatten(0, list(sides))
    return fitted


@functools.lru_cache(maxsize=64)
def _kept_mask(sides: Sides, window: Sides, shift: Sides, padding: Sides, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference would be refused by a later training
        return _mask(sides, window, shift, padding, device)


def _mask(sides: Sides, window: Sides, shift: Sides, padding: Sides, device: torch.device) -> Tensor:
    """Summands between the cells of each window, `[windows, N, N]`: cells that only the way round the edges brings
    together are kept apart, and padding from all others."""
    regions, padded = [], []
    for side, length, step, more in zip(sides, window, shift, padding, strict=True):
        place = torch.arange(side + more, device=device)
        regions.append(
            (place >= side + more - length).long() + (place >= side + more - step).long() if step else 0 * place
        )
        padded.append((place + step) % (side + more) >= side)
    empty = padded[0][:, None] | padded[1][None]
    region = torch.where(empty, -1, regions[0][:, None] * 3 + regions[1][None])
    rows, columns = region.shape[0] // window[0], region.shape[1] // window[1]
    region = region.view(rows, window[0], columns, window[1]).transpose(1, 2).reshape(rows * columns, -1)
    other = region[:, :, None] != region[:, None, :]
    cut = torch.where(region[:, None, :] == -1, -math.inf, _CUT)
    return torch.where(other, cut, 0.0)
