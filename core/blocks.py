"""Residual blocks around token mixers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from timm.layers import DropPath
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.mixers.contract import Mixer

PLACEMENTS = ("pre", "post", "both")
"""Of the norms of a `ResidualBlock`."""


class MixerBlock(nn.Module):
    """`x ← x + DropPath(mixer(norm(x)))`, with x the fp32 residual stream.

    Mamba's code carries two streams, (hidden, residual), and adds the previous mixer's output at the start of a block,
    which lets one kernel add and normalise. The numbers are those of this form, with one difference in book-keeping:
    there a block's DropPath acts on the mixer before it, so that rates lie one place further along.
    """

    def __init__(self, norm: norms.RMSNorm, mixer: Mixer, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.drop_path(self.mixer(self.norm(x)))
        return x + update


class ResidualBlock(nn.Module):
    """A mixer and, if there is one, an MLP, each with its norm and its way around.

    With f either of the two, `placement` is one of

        pre     x ← x + f(norm(x))
        post    x ← norm(x + f(x))
        both    x ← x + norm'(f(norm(x)))

    Args:
        mixer: of the width that `norm` makes norms for.
        mlp: `None` for a block that only mixes.
        norm: makes one norm.
        placement: `"pre"`, `"post"` or `"both"`.
        drop_path: rate at which f is left out of a sample in training.
        fp32_stream: keep x in fp32 where `"post"` would round it to the dtype of the norm.
    """

    def __init__(
        self,
        mixer: Mixer,
        mlp: nn.Module | None,
        norm: Callable[[], nn.Module],
        placement: str = "pre",
        drop_path: float = 0.0,
        fp32_stream: bool = True,
    ) -> None:
        super().__init__()
        self.placement = placement
        self.fp32_stream = fp32_stream
        self.norm = norm()
        self.mixer = mixer
        self.norm_out = norm() if placement == "both" else nn.Identity()
        self.norm2 = nn.Identity() if mlp is None else norm()
        self.mlp = nn.Identity() if mlp is None else mlp
        self.norm2_out = norm() if placement == "both" and mlp is not None else nn.Identity()
        self.mixes_channels = mlp is not None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def init_weights(self) -> None:
        """Norms at one, the mixer by its own rules, linear layers of the MLP by torch's and without biases."""
        self.mixer.init_weights()
        for part in (self.norm, self.norm_out, self.norm2, self.norm2_out, self.mlp):
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.LayerNorm | norms.RMSNorm):
                    module.reset_parameters()
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self._after_mixer(x, self.mixer(self._enter(x, self.norm), cu_seqlens))

    def prefill(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.mixer.prefill(self._enter(x, self.norm), state)
        return self._after_mixer(x, y), state

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.mixer.step(self._enter(x_t, self.norm), state)
        return self._after_mixer(x_t, y), state

    def _after_mixer(self, x: Tensor, y: Tensor) -> Tensor:
        x = self._join(x, y, self.norm, self.norm_out)
        if not self.mixes_channels:
            return x
        return self._join(x, self.mlp(self._enter(x, self.norm2)), self.norm2, self.norm2_out)

    def _enter(self, x: Tensor, norm: nn.Module) -> Tensor:
        if self.placement == "post":
            return x.to(cast("Tensor", norm.weight).dtype)
        entered: Tensor = norm(x)
        return entered

    def _join(self, x: Tensor, y: Tensor, norm: nn.Module, norm_out: nn.Module) -> Tensor:
        if self.placement != "post":
            update: Tensor = self.drop_path(norm_out(y))
            return x + update
        normed: Tensor = norm(x + self.drop_path(y))
        return norms.at_least_fp32(normed) if self.fp32_stream else normed


class SharingBlock(ResidualBlock):
    """A `ResidualBlock` around a mixer that shares: its calls take, behind the usual arguments, what the block with the
    mixer of that name before it gave, and return, behind the usual results, what the next one gets."""

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, *shared: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        y, _, given = self.mixer.mix_sharing(self._enter(x, self.norm), shared, None, cu_seqlens)
        return self._after_mixer(x, y), *given

    def prefill(self, x: Tensor, state: Any = None, *shared: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        y, state, given = self.mixer.mix_sharing(self._enter(x, self.norm), shared, state)
        return self._after_mixer(x, y), state, *given

    def step(self, x_t: Tensor, state: Any, *shared: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, state, *given = self.prefill(x_t.unsqueeze(1), state, *shared)
        return x.squeeze(1), state, *given
