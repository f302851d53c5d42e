"""DNA-xLSTM: sLSTM or mLSTM models of DNA, causal or of both directions, of one strand or both.

    causal         x ← block(x)
    tied           x ← block(x) + flip(block(flip x))                  each block in both directions, with its residual
    alternating    x ← flip(block(flip x)) and x ← block(x) in turn    from the last letter first

Paper: Schmidinger et al., "Bio-xLSTM" (arXiv 2411.04165). Reference: https://github.com/ml-jku/DNA-xLSTM (Apache-2.0).
This is an independent implementation that reads the reference's state dictionaries:

    model = sinuous.create_model("dna_xlstm_2m", direction="tied", strands="shared", published_strands=True,
                                 checkpoint_path="loss.ckpt")

The reference's model of both strands has one flaw: in the second strand the sLSTMs' group norm gets the heads in
reverse order, and leaves them so; with more than one head its outputs are not equivariant. Weights trained that way
need the same: `published_strands=True`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.blocks import ResidualBlock, SharingBlock
from sinuous.core.checks import check_arguments, check_choice, described
from sinuous.core.mixers import SLSTM, mixer_class
from sinuous.core.norms import MultiHeadLayerNorm
from sinuous.core.registry import register_model
from sinuous.core.stack import State
from sinuous.genomics.heads import check_bounds
from sinuous.genomics.strands import StrandedModel, fit_strands, reversal, reversed_each
from sinuous.genomics.xlstm import XLSTM_STACK, bio_xlstm_cfgs, fit_xlstm

__all__ = ["DNAXLSTM", "checkpoint_filter_fn"]

DIRECTIONS = ("causal", "tied", "alternating")
SINUSOID_THETA = 1e5

_MLSTM: dict[str, Any] = {"pattern": "mlstm", "bias": True}
SIZES: dict[str, dict[str, Any]] = {
    "dna_xlstm_500k": {"dim": 128, "depth": 6},
    "dna_xlstm_1_4m": {"dim": 256, "depth": 4},
    "dna_xlstm_2m": {"dim": 256, "depth": 6},
    "dna_xlstm_2m_mlstm": {"dim": 256, "depth": 5, **_MLSTM},
    "dna_xlstm_4m_mlstm": {"dim": 256, "depth": 9, **_MLSTM, "rotary": True},
    "dna_xlstm_nano": {"dim": 192, "depth": 4},
}


class DNAXLSTM(StrandedModel):
    """DNA-xLSTM.

    Args:
        dim: D, width of the residual stream.
        depth: number of blocks.
        num_heads: of each block's memory.
        vocab_size: V.
        pattern: names of causal mixers, taken in turn and over again. `slstm` brings an MLP with it.
        head: `"lm"`, `"sequence"` or `"position"`.
        num_classes: of the last two heads.
        bias: in the projections of `mlstm`.
        rotary: `mlstm` rotates queries and keys of each head by their positions, after the gates.
        sinusoidal: add sines and cosines of the position, times a learned scale, to the embedding.
        direction: `"causal"`, `"tied"` or `"alternating"`.
        strands, class_complement, join_dim: see `StrandedModel`. A model of both strands is never causal.
        published_strands: see above; for `strands="shared"`.
        drop_rate: dropout after the embedding and inside the MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: if a size or a choice is not allowed, or two of them do not go together.
    """

    @check_arguments
    def __init__(
        self,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        vocab_size: int = 12,
        pattern: str | Sequence[str] = "slstm",
        head: str = "lm",
        num_classes: int = 0,
        bias: bool = False,
        rotary: bool = False,
        sinusoidal: bool = False,
        direction: str = "causal",
        strands: str = "single",
        published_strands: bool = False,
        class_complement: Sequence[int] | None = None,
        join_dim: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        names = (pattern,) if isinstance(pattern, str) else tuple(pattern)
        check_choice("direction", direction, DIRECTIONS)
        _check_options(names, dim, bias, rotary, sinusoidal, direction, strands, published_strands)
        mlstm = {"bias": bias, "rotary": "head" if rotary else None}
        super().__init__(
            vocab_size,
            dim,
            depth,
            num_heads=num_heads,
            pattern=names,
            head=head,
            num_classes=num_classes,
            strands=strands,
            class_complement=class_complement,
            join_dim=join_dim,
            mixer_options={"mlstm": mlstm} if "mlstm" in names else {},
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            blocks=(TiedBlock, SharingBlock) if direction == "tied" else (ResidualBlock, SharingBlock),
            device=device,
            dtype=dtype,
            **XLSTM_STACK | {"mlp_ratio": 1.1, "mlp_multiple_of": 8, "mlp_rounding": "down"},
        )
        self.direction, self.published_strands = direction, published_strands
        self.causal = self.causal and direction == "causal"
        self.absolute_pos_embeds = Sinusoids(dim, device=device, dtype=dtype) if sinusoidal else None
        for mixer in [m for m in self.modules() if isinstance(m, SLSTM)] if published_strands else []:
            norm = PublishedNorm(mixer.num_heads, mixer.head_dim, weight_from_one=True, device=device, dtype=dtype)
            mixer.group_norm = norm

    def init_weights(self) -> None:
        super().init_weights()
        for module in self.modules():
            if isinstance(module, Sinusoids):
                module.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        positions = set() if self.absolute_pos_embeds is None else {"absolute_pos_embeds.scale"}
        return super().no_weight_decay() | positions

    def _strand(self, x: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> Tensor:
        stream = self._embed(x, 2)
        check_bounds(stream, cu_seqlens)
        steps = torch.arange(stream.shape[1], device=stream.device)
        if self.absolute_pos_embeds is not None:
            starts = 0 if cu_seqlens is None else _starts(cu_seqlens, len(steps))
            stream = stream + self.absolute_pos_embeds(steps - starts, stream.dtype)
        orders = None
        if self.direction == "alternating":
            back = steps.flip(0) if cu_seqlens is None else reversal(cu_seqlens, len(steps))
            orders = [torch.stack([back, back]), torch.stack([steps, steps])]
        return self._finish(self.layers(stream, cu_seqlens, None, orders, position_ids))

    def _check_parts(self) -> None:
        if self.direction != "causal":
            raise ValueError(
                f"direction={self.direction!r} reads each strand from both ends and has no causal trunk; "
                "build the model with direction='causal'"
            )
        if self.published_strands:
            raise ValueError(
                "published_strands=True reads both strands at once and has no trunk for single ones; call the model"
            )

    def _read(
        self, x: Tensor, state: State | None, position_ids: Tensor | None = None, ndim: int = 2
    ) -> tuple[Tensor, State]:
        if self.absolute_pos_embeds is None:
            return super()._read(x, state, position_ids, ndim)
        if state is not None and not (isinstance(state, tuple | list) and state and isinstance(state[0], Tensor)):
            raise ValueError(
                f"state must be the position and a part for each block (got {described(state)}); "
                "give what initial_state or prefill returned"
            )
        stream = self._embed(x, ndim)
        place, *rest = (stream.new_zeros(len(stream), dtype=torch.long), None) if state is None else state
        steps = stream.shape[1] if ndim == 2 else 1
        places = place[:, None] + torch.arange(steps, device=place.device) if ndim == 2 else place
        stream = stream + self.absolute_pos_embeds(places, stream.dtype)
        features, after = self._run(stream, None if state is None else tuple(rest), position_ids, ndim)
        return features, (place + steps, *after)

    def _start(self, batch_size: int, device: torch.device | None, dtype: torch.dtype | None) -> State:
        start = super()._start(batch_size, device, dtype)
        if self.absolute_pos_embeds is None:
            return start
        place = torch.zeros(batch_size, dtype=torch.long, device=device or self.embedding.weight.device)
        return (place, *start)


class TiedBlock(ResidualBlock):
    """A residual block b that reads its sequence from both ends with one set of weights: b(x) + flip(b(flip x)).

    Both terms hold the residual stream, which so doubles with every block, as published.
    """

    looks_ahead: ClassVar[bool] = True

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        grid: list[int] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        turned = None if position_ids is None else reversed_each(position_ids, cu_seqlens)
        future = super().forward(reversed_each(x, cu_seqlens), cu_seqlens, grid, turned)
        return super().forward(x, cu_seqlens, grid, position_ids) + reversed_each(future, cu_seqlens)


class PublishedNorm(MultiHeadLayerNorm):
    """Layer norm of each head, `[B, T, H, V]` to `[B, T, H V]`, the heads of second strands in reverse order.

    They are the second half of the batch; of packed sequences, whose batch is 1, the second half of all steps.
    """

    def forward(self, x: Tensor) -> Tensor:
        axis = 1 if x.shape[0] == 1 else 0
        half = x.shape[axis] // 2
        first, second = x.split([half, half], axis)
        return super().forward(torch.cat([first, second.flip(2)], axis))


class Sinusoids(nn.Module):
    """Positions as sines and cosines of D/2 rates from 1 down to nearly 1/θ, θ = 1e5, times a learned number."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.empty(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.dim**-0.5)

    def forward(self, position: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings `[..., D]` of positions `[...]`, the angles in `dtype`."""
        half = self.dim // 2
        rates = SINUSOID_THETA ** -(torch.arange(half, device=position.device, dtype=torch.float32) / half)
        angle = position.unsqueeze(-1).to(dtype) * rates.to(dtype)
        return torch.cat([angle.sin(), angle.cos()], -1) * norms.at_least_fp32(self.scale)


def _starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """For each of `length` steps, the first step of its packed sequence."""
    return torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=length)


def _check_options(
    names: tuple[str, ...],
    dim: int,
    bias: bool,
    rotary: bool,
    sinusoidal: bool,
    direction: str,
    strands: str,
    published_strands: bool,
) -> None:
    for name in names:
        if not mixer_class(name).causal:
            raise ValueError(
                f"pattern must name causal mixers, which the direction turns (got {name!r}, which looks both ways); "
                "choose mlstm or slstm"
            )
        if direction == "tied" and mixer_class(name).shared_option is not None:
            raise ValueError(
                f"direction='tied' is for mixers that share nothing with other blocks (got {name!r}); "
                "choose direction='alternating' or another mixer"
            )
    for option, value in (("bias", bias), ("rotary", rotary)):
        if value and "mlstm" not in names:
            raise ValueError(f"{option}=True is for mlstm, which the pattern {list(names)} lacks; leave it out")
    if sinusoidal and dim % 2:
        raise ValueError(f"sinusoidal=True needs an even dim, half sines and half cosines (got {dim})")
    if published_strands and strands != "shared":
        raise ValueError(
            f"published_strands=True is for the authors' weights of strands='shared' (got strands={strands!r}); "
            "leave it out"
        )


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: DNAXLSTM) -> dict[str, Tensor]:
    """The authors' weights, or our own, as `model` has them; a head of another kind is left out with a warning.

    Raises:
        ValueError: if the weights have another vocabulary, another number of heads, other letters for complements, or
            are of a model of one strand where `model` is of both, or the other way.
    """
    return fit_xlstm(fit_strands(state_dict, model), model)


default_cfgs = bio_xlstm_cfgs(
    {name: {"input_size": (32768,) if name == "dna_xlstm_4m_mlstm" else (1024,)} for name in SIZES}, "DNA-xLSTM"
)


def _create(variant: str, **kwargs: Any) -> DNAXLSTM:
    return DNAXLSTM(**{**SIZES[variant], **kwargs})


@register_model(domain="genomics")
def dna_xlstm_500k(pretrained: bool = False, **kwargs: Any) -> DNAXLSTM:
    """DNA-xLSTM with six sLSTM blocks of width 128."""
    return _create("dna_xlstm_500k", **kwargs)


@register_model(domain="genomics")
def dna_xlstm_1_4m(pretrained: bool = False, **kwargs: Any) -> DNAXLSTM:
    """DNA-xLSTM with four sLSTM blocks of width 256: the authors' script."""
    return _create("dna_xlstm_1_4m", **kwargs)


@register_model(domain="genomics")
def dna_xlstm_2m(pretrained: bool = False, **kwargs: Any) -> DNAXLSTM:
    """DNA-xLSTM with six sLSTM blocks of width 256."""
    return _create("dna_xlstm_2m", **kwargs)


@register_model(domain="genomics")
def dna_xlstm_2m_mlstm(pretrained: bool = False, **kwargs: Any) -> DNAXLSTM:
    """DNA-xLSTM with five mLSTM blocks of width 256."""
    return _create("dna_xlstm_2m_mlstm", **kwargs)


@register_model(domain="genomics")
def dna_xlstm_4m_mlstm(pretrained: bool = False, **kwargs: Any) -> DNAXLSTM:
    """DNA-xLSTM with nine mLSTM blocks of width 256 and rotary positions, for long contexts."""
    return _create("dna_xlstm_4m_mlstm", **kwargs)


@register_model(domain="genomics")
def dna_xlstm_nano(pretrained: bool = False, **kwargs: Any) -> DNAXLSTM:
    """DNA-xLSTM with four sLSTM blocks of width 192, small enough to ship; ours."""
    return _create("dna_xlstm_nano", **kwargs)
