"""Residual blocks around token mixers."""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn

from sinuous.core.mixers.contract import Mixer
from sinuous.core.norms import RMSNorm


class MixerBlock(nn.Module):
    """`x ← x + DropPath(mixer(norm(x)))`, with x the fp32 residual stream.

    Mamba's code carries two streams, (hidden, residual), and adds the previous mixer's output at the start of a block,
    which lets one kernel add and normalise. The numbers are those of this form, with one difference in book-keeping:
    there a block's DropPath acts on the mixer before it, so that rates lie one place further along.
    """

    def __init__(self, norm: RMSNorm, mixer: Mixer, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.drop_path(self.mixer(self.norm(x)))
        return x + update
