"""Residual blocks around token mixers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.mixers.contract import Mixer

PLACEMENTS = ("pre", "post", "both")
"""Places of the norms of a `ResidualBlock`."""


class ResidualBlock(nn.Module):
    """A mixer and, if there is one, an MLP, each with its norm and its way around.

    With f either of the two, `placement` is one of

        pre     x ← x + f(norm(x))
        post    x ← norm(x + f(x))
        both    x ← x + norm'(f(norm(x)))

    Mamba's code carries two streams, (hidden, residual), and adds the previous mixer's output at the start of a block,
    which lets one kernel add and normalise. The numbers are those of `pre`, with one difference in book-keeping: there
    a block's DropPath acts on the mixer before it, so that rates lie one place further along.

    Args:
        mixer: of the width that `norm` makes norms for.
        mlp: `None` for a block that only mixes.
        norm: makes one norm.
        placement: `"pre"`, `"post"` or `"both"`.
        drop_path: rate at which f is left out of a sample in training.
        fp32_stream: keep x in fp32 where `"post"` would round it to the dtype of the norm.
        scale: makes one scale of f's output, as timm's `LayerScale` is: x ← x + scale(f(norm(x))).
    """

    # TorchScript compiles only the branch that a constant takes; the other one reads weights that a block may lack.
    __constants__: ClassVar[list[str]] = ["mixes_channels", "norms_last", "shares", "reads_positions"]
    shares = False
    """The block takes tensors from blocks before it, and gives some to those behind; see `SharingBlock`."""
    looks_ahead: ClassVar[bool] = False
    """The block reads its sequence from the end too, around whatever mixer: there is no `prefill` then."""
    norm_name: ClassVar[str] = "norm"
    mixer_name: ClassVar[str] = "mixer"
    """Parts of names of parameters. A subclass with names of its own has properties `norm` and `mixer` and replaces
    `forward` and `_before_mixer`, which TorchScript compiles."""

    if TYPE_CHECKING:
        norm: nn.Module
        mixer: Mixer

    def __init__(
        self,
        mixer: Mixer,
        mlp: nn.Module | None,
        norm: Callable[[], nn.Module],
        placement: str = "pre",
        drop_path: float = 0.0,
        fp32_stream: bool = True,
        scale: Callable[[], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.norms_last = placement == "post"
        self.fp32_stream = fp32_stream
        setattr(self, self.norm_name, norm())
        setattr(self, self.mixer_name, mixer)
        self.reads_positions = mixer.reads_positions and not self.shares
        self.norm_out = norm() if placement == "both" else nn.Identity()
        self.ls1 = scale()
        self.norm2 = nn.Identity() if mlp is None else norm()
        self.mlp = nn.Identity() if mlp is None else mlp
        self.norm2_out = norm() if placement == "both" and mlp is not None else nn.Identity()
        self.ls2 = nn.Identity() if mlp is None else scale()
        self.mixes_channels = mlp is not None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def init_weights(self) -> None:
        """Norms at one, scales at their start, the mixer by its own rules, linear layers of the MLP by torch's and
        without biases."""
        self.mixer.init_weights()
        for part in (self.norm, self.norm_out, self.ls1, self.norm2, self.norm2_out, self.ls2, self.mlp):
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.LayerNorm | norms.RMSNorm | LayerScale):
                    module.reset_parameters()
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        grid: list[int] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if self.reads_positions:
            y = self.mixer(self._before_mixer(x), cu_seqlens, grid, position_ids)
        else:
            y = self.mixer(self._before_mixer(x), cu_seqlens, grid)
        return self._after_mixer(x, y)

    def prefill(self, x: Tensor, state: Any = None, position_ids: Tensor | None = None) -> tuple[Tensor, Any]:
        positions = (position_ids,) if self.reads_positions else ()
        y, state = self.mixer.prefill(self._before_mixer(x), state, *positions)
        return self._after_mixer(x, y), state

    def step(self, x_t: Tensor, state: Any, position_ids: Tensor | None = None) -> tuple[Tensor, Any]:
        positions = (position_ids,) if self.reads_positions else ()
        y, state = self.mixer.step(self._before_mixer(x_t), state, *positions)
        return self._after_mixer(x_t, y), state

    def _before_mixer(self, x: Tensor) -> Tensor:
        if self.norms_last:
            return x.to(self.norm.weight.dtype)  # type: ignore[arg-type]
        normed: Tensor = self.norm(x)
        return normed

    def _after_mixer(self, x: Tensor, y: Tensor) -> Tensor:
        if self.norms_last:
            x = self._stream(self.norm(x + self.drop_path(self.ls1(y))))
        else:
            x = x + self.drop_path(self.ls1(self.norm_out(y)))
        if self.mixes_channels:
            if self.norms_last:
                y = self.mlp(x.to(self.norm2.weight.dtype))  # type: ignore[arg-type]
                x = self._stream(self.norm2(x + self.drop_path(self.ls2(y))))
            else:
                x = x + self.drop_path(self.ls2(self.norm2_out(self.mlp(self.norm2(x)))))
        return x

    def _stream(self, x: Tensor) -> Tensor:
        return norms.at_least_fp32(x) if self.fp32_stream else x


class Sharing(ResidualBlock):
    """Makes a `ResidualBlock` one around a mixer that shares: its calls take, behind the usual arguments, the tensors
    that the block with the mixer of that name before it gave, and return, behind the usual results, those for the next
    one. A subclass of a block derives from this, then from the block."""

    shares = True

    def forward(  # type: ignore[override]
        self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None, *shared: Tensor
    ) -> tuple[Tensor, ...]:
        y, _, passed_on = self.mixer.mix_sharing(self._before_mixer(x), shared, None, cu_seqlens)
        return self._after_mixer(x, y), *passed_on

    def prefill(self, x: Tensor, state: Any = None, *shared: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        y, state, passed_on = self.mixer.mix_sharing(self._before_mixer(x), shared, state)
        return self._after_mixer(x, y), state, *passed_on

    def step(self, x_t: Tensor, state: Any, *shared: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, state, *passed_on = self.prefill(x_t.unsqueeze(1), state, *shared)
        return x.squeeze(1), state, *passed_on


class SharingBlock(Sharing):
    """The `ResidualBlock` of mixers that share."""


def carry(
    call: str,
    blocks: Iterable[Any],
    x: Tensor,
    states: Iterable[Any],
    shared: dict[type, list[Tensor]],
    position_ids: Tensor | None = None,
) -> tuple[Tensor, list[Any]]:
    """Run blocks one after another from states on.

    Args:
        call: `"prefill"` or `"step"`.
        blocks: those that share get, by the class of their mixers, what is in `shared`.
        x: the residual stream ahead of the first block.
        states: of each block, `None` at the start of a sequence.
        shared: what earlier blocks shared; what these share is put in.
        position_ids: for blocks that read positions.

    Returns:
        The stream behind the last block, and the states after the last step.
    """
    after = []
    for block, before in zip(blocks, states, strict=True):
        if getattr(block, "shares", False):
            kind = type(block.mixer)
            x, state, *shared[kind] = getattr(block, call)(x, before, *shared.get(kind, ()))
        elif position_ids is not None and getattr(block, "reads_positions", False):
            x, state = getattr(block, call)(x, before, position_ids)
        else:
            x, state = getattr(block, call)(x, before)
        after.append(state)
    return x, after
