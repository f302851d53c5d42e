"""One backbone for sequences of tokens: an embedding, residual blocks around mixers chosen by name, and a head.

    x_0 = embedding(ids)                                  the residual stream, in fp32 unless told otherwise
    x ← x + mixer(norm(x));  x ← x + mlp(norm(x))         `depth` times, the mixers taken in turn from `pattern`
    logits = norm_f(x) Wᵀ                                 W the embedding itself, or a matrix of its own

Names of parameters follow state-spaces/mamba without its `backbone.` (embedding, layers.N.norm, layers.N.mixer,
layers.N.norm2, layers.N.mlp, norm_f), so that a pattern `("mamba",)` is the language model of Gu and Dao
(arXiv 2312.00752, section 3.4), `("mamba2",)` that of Dao and Gu (arXiv 2405.21060), and several names make a hybrid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models import checkpoint
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.blocks import PLACEMENTS, ResidualBlock, SharingBlock
from sinuous.core.mixers import Bidirectional, Mixer, build_mixer, list_mixers, mixer_class
from sinuous.core.mixers import mixer_options as options_of

MLPS: dict[str, Callable[..., nn.Module]] = {
    "gelu": Mlp,
    "geglu": functools.partial(GluMlp, act_layer=nn.GELU, gate_last=False),
    "swiglu": SwiGLU,
}
NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms": norms.RMSNorm,
    "layer": norms.LayerNorm,
    "layer_no_bias": functools.partial(norms.LayerNorm, bias=False),
}
WRITE_TO_THE_STREAM = ("out_proj.weight", "o_proj.weight", "linear_out.weight", "to_out.weight", "fc2.weight")
PLACE = {"block_index", "num_blocks"}
"""Options of mixers that start differently for their place in a model."""

State = tuple[Any, ...]
"""The states of all mixers, first block first."""


class SequenceModel(nn.Module):
    """A language model, a masked model, or an encoder, of any registered mixers.

    Args:
        vocab_size: number of tokens.
        dim: width of the residual stream.
        depth: number of blocks.
        pattern: names of mixers, taken in turn and over again; one name stands for itself.
        mixer_options: for each name of the pattern that needs any, keyword arguments of its constructor. Mixers that
            have `num_blocks` or `block_index` are told `depth` and their place; those that share with their name in
            later blocks (rwkv7 its first values) read, in each but the first of them, what it shares.
        mlp: `"none"`, `"gelu"`, `"geglu"` or `"swiglu"`, after every mixer; or one of them for each name whose mixers
            have one, others having none.
        mlp_ratio: width of the MLP between its layers, over `dim`.
        mlp_multiple_of: that width is rounded up to a multiple of this.
        mlp_bias: biases in the MLP.
        norm: `"rms"`, `"layer"` or `"layer_no_bias"`.
        norm_eps: added under its root.
        norm_placement: `"pre"`, `"post"` or `"both"`; see `ResidualBlock`.
        final_norm: a norm before the head.
        tie_head: the head's matrix is the embedding.
        causal: `False` for a model that sees both sides: causal mixers get a twin that runs from the end.
        pad_vocab_multiple: the embedding has `padded_vocab_size` rows, `vocab_size` rounded up to a multiple of this;
            logits have as many columns, as in the published models, and those from `vocab_size` on mean nothing.
        logit_cap: c of `c tanh(logits / c)`; `None` leaves logits as they are.
        residual_in_fp32: keep the residual stream in fp32 whatever the dtype of the parameters.
        weight_init: `"gpt2"` or `"xlstm"`, how embedding, head and MLPs start; see `init_weights`.
        drop_rate: dropout after the embedding and inside the MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.

    Shapes: B batch, T steps. Packed sequences are `[1, ΣT]` with `cu_seqlens`.

    Raises:
        ValueError: if a size or a choice is not allowed, a mixer is unknown or is not causal in a causal model, or
            options are for a mixer that is not in the pattern.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        pattern: str | Sequence[str] = ("mamba",),
        mixer_options: Mapping[str, Mapping[str, Any]] | None = None,
        mlp: str | Mapping[str, str] = "none",
        mlp_ratio: float = 4.0,
        mlp_multiple_of: int = 1,
        mlp_bias: bool = False,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        norm_placement: str = "pre",
        final_norm: bool = True,
        tie_head: bool = True,
        causal: bool = True,
        pad_vocab_multiple: int = 1,
        logit_cap: float | None = None,
        residual_in_fp32: bool = True,
        weight_init: str = "gpt2",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        names = (pattern,) if isinstance(pattern, str) else tuple(pattern)
        options = {name: dict(given) for name, given in (mixer_options or {}).items()}
        _at_least_one(vocab_size=vocab_size, dim=dim, depth=depth, mlp_multiple_of=mlp_multiple_of)
        _at_least_one(pad_vocab_multiple=pad_vocab_multiple)
        mlps = dict.fromkeys(names, mlp) if isinstance(mlp, str) else {**dict.fromkeys(names, "none"), **mlp}
        for kind in mlps.values():
            _one_of("mlp", kind, ("none", *MLPS))
        _one_of("norm", norm, tuple(NORMS))
        _one_of("norm_placement", norm_placement, PLACEMENTS)
        _one_of("weight_init", weight_init, ("gpt2", "xlstm"))
        _check_pattern(names, options, mlps, causal)

        self.vocab_size = vocab_size
        self.padded_vocab_size = math.ceil(vocab_size / pad_vocab_multiple) * pad_vocab_multiple
        self.num_features = self.embed_dim = self.dim = dim
        self.depth = depth
        self.pattern = names
        self.causal = causal
        self.tie_head = tie_head
        self.logit_cap = logit_cap
        self.residual_in_fp32 = residual_in_fp32
        self.weight_init = weight_init
        self.grad_checkpointing = False

        make_norm = functools.partial(NORMS[norm], dim, eps=norm_eps, **dd)
        hidden = math.ceil(dim * mlp_ratio / mlp_multiple_of) * mlp_multiple_of
        mlp_options = {"bias": mlp_bias, "drop": drop_rate, **dd}
        self.embedding = nn.Embedding(self.padded_vocab_size, dim, **dd)
        self.drop = nn.Dropout(drop_rate)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.layers = nn.ModuleList(
            (SharingBlock if mixer_class(name).reads_shared else ResidualBlock)(
                _mixer(name, dim, {**_of_place(self._names(), i), **options.get(name, {}), **dd}, causal),
                _mlp(mlps[name], dim, hidden, mlp_options),
                make_norm,
                norm_placement,
                rate,
                residual_in_fp32,
            )
            for i, (name, rate) in enumerate(zip(self._names(), rates, strict=True))
        )
        self.norm_f = make_norm() if final_norm else nn.Identity()
        self.head = None if tie_head else nn.Linear(dim, self.padded_vocab_size, bias=False, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter and buffer anew, the mixers by their own rules.

        With `"gpt2"`, embedding and head are N(0, 0.02²), and what writes to the residual stream, as other rules leave
        it, is divided by the root of the number of its summands, except in mixers that are told `num_blocks` and have
        a rule of their own. With `"xlstm"`, embedding, head and the first layers of MLPs are N(0, 2 / (5 dim)) and
        their last layers N(0, 4 / (depth² dim)), as in NX-AI/xlstm."""
        for block in self._blocks():
            block.init_weights()
        if not isinstance(self.norm_f, nn.Identity):
            cast("norms.RMSNorm", self.norm_f).reset_parameters()
        xlstm = self.weight_init == "xlstm"
        small, last = math.sqrt(2 / (5 * self.dim)), 2 / (self.depth * math.sqrt(self.dim))
        summands = sum(1 + block.mixes_channels for block in self._blocks())
        with torch.no_grad():
            for name, block in zip(self._names(), self._blocks(), strict=True):
                scaled: list[nn.Module] = [] if PLACE & options_of(name) else [block.mixer]
                if xlstm:
                    for key, parameter in block.mlp.named_parameters():
                        if parameter.ndim == 2:
                            parameter.normal_(std=last if key.endswith(WRITE_TO_THE_STREAM) else small)
                else:
                    scaled.append(block.mlp)
                for part in scaled:
                    for key, parameter in part.named_parameters():
                        if key.endswith(WRITE_TO_THE_STREAM):
                            parameter.div_(math.sqrt(summands))
        nn.init.normal_(self.embedding.weight, std=small if xlstm else 0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=small if xlstm else 0.02)

    def _names(self) -> list[str]:
        """Of the mixers, block by block."""
        return [self.pattern[i % len(self.pattern)] for i in range(self.depth)]

    def _blocks(self) -> list[ResidualBlock]:
        return [cast("ResidualBlock", block) for block in self.layers]

    def no_weight_decay(self) -> set[str]:
        return {f"layers.{i}.mixer.{name}" for i, b in enumerate(self._blocks()) for name in b.mixer.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^embedding", "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f|^head", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping what it computed."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits `[B, T, padded_vocab_size]` of ids `[B, T]` or embeddings `[B, T, dim]`."""
        return self.forward_head(self.forward_features(x, cu_seqlens))

    def forward_features(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """What the head reads, `[B, T, dim]`, of ids `[B, T]` or embeddings `[B, T, dim]`."""
        x = self._embed(x, 2)
        shared: dict[str, list[Tensor]] = {}
        for name, block in zip(self._names(), self._blocks(), strict=True):
            run = functools.partial(checkpoint, block) if self.grad_checkpointing else block
            if isinstance(block, SharingBlock):
                x, *shared[name] = run(x, cu_seqlens, *shared.get(name, ()))
            else:
                x = run(x, cu_seqlens)
        return self._finish(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits of features `[..., dim]`."""
        logits = F.linear(x, self.embedding.weight if self.head is None else self.head.weight)
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)

    def prefill(self, x: Tensor, state: State | None = None, *, last_only: bool = False) -> tuple[Tensor, State]:
        """Read a part of a sequence and go on from `state`.

        Args:
            x: ids `[B, T]` or embeddings `[B, T, dim]`.
            state: what an earlier call returned; `None` at the start of a sequence.
            last_only: compute the logits of the last step alone.

        Returns:
            Logits `[B, T, padded_vocab_size]`, or `[B, 1, padded_vocab_size]`, and the state after the last step.

        Raises:
            NotImplementedError: if the model is not causal.
        """
        x = self._embed(x, 2)
        shared: dict[str, list[Tensor]] = {}
        after = []
        for name, block, before in zip(self._names(), self._blocks(), self._states(state), strict=True):
            x, new, *shared[name] = block.prefill(x, before, *shared.get(name, ()))
            after.append(new)
        return self.forward_head(self._finish(x[:, -1:] if last_only else x)), tuple(after)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: ids `[B]` or embeddings `[B, dim]` to logits `[B, padded_vocab_size]` and the next state.

        Raises:
            NotImplementedError: if the model is not causal.
        """
        x = self._embed(x_t, 1)
        shared: dict[str, list[Tensor]] = {}
        after = []
        for name, block, before in zip(self._names(), self._blocks(), self._states(state), strict=True):
            x, new, *shared[name] = block.step(x, before, *shared.get(name, ()))
            after.append(new)
        return self.forward_head(self._finish(x)), tuple(after)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first step, on the device and in the dtype of the parameters if none is given.

        Raises:
            NotImplementedError: if the model is not causal.
        """
        if not self.causal:
            _no_state()
        return tuple(block.mixer.initial_state(batch_size, device, dtype) for block in self._blocks())

    def _states(self, state: State | None) -> State:
        if not self.causal:
            _no_state()
        return (None,) * self.depth if state is None else state

    def _embed(self, x: Tensor, ndim: int) -> Tensor:
        if x.is_floating_point():
            if x.ndim != ndim + 1 or x.shape[-1] != self.dim:
                wanted = "[B, T, dim]" if ndim == 2 else "[B, dim]"
                raise ValueError(f"embeddings must be {wanted} with dim {self.dim} (got {list(x.shape)})")
        else:
            if x.ndim != ndim:
                raise ValueError(f"ids must be {'[B, T]' if ndim == 2 else '[B]'} (got {list(x.shape)})")
            x = self.embedding(x)
        x = self.drop(x)
        return norms.at_least_fp32(x) if self.residual_in_fp32 else x

    def _finish(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm_f(x)
        return normed.to(self.embedding.weight.dtype)


def _no_state() -> NoReturn:
    raise NotImplementedError("this model looks at the future (causal=False) and has no state to carry; call forward")


def _mixer(name: str, dim: int, options: dict[str, Any], causal: bool) -> Mixer:
    if causal or not mixer_class(name).causal:
        return build_mixer(name, dim, **options)
    return Bidirectional(name, dim, **options)


def _of_place(names: Sequence[str], i: int) -> dict[str, int]:
    """Where the mixer of block i stands among those of all blocks, for those that differ for it."""
    known = {"block_index": i, "num_blocks": len(names), mixer_class(names[i]).reads_shared: names[i] in names[:i]}
    return {option: value for option, value in known.items() if option in options_of(names[i])}


def _mlp(kind: str, dim: int, hidden: int, options: dict[str, Any]) -> nn.Module | None:
    if kind == "none":
        return None
    return MLPS[kind](dim, 2 * hidden if kind == "geglu" else hidden, **options)  # GluMlp counts both halves


def _check_pattern(
    names: tuple[str, ...], options: Mapping[str, Any], with_mlp: Mapping[str, str], causal: bool
) -> None:
    if not names:
        raise ValueError(f"pattern must name at least one mixer (got none); choose from {', '.join(list_mixers())}")
    if strangers := sorted(set(options) - set(names)):
        raise ValueError(
            f"mixer_options has options for {', '.join(strangers)}, which the pattern {list(names)} lacks; "
            "correct the name or leave them out"
        )
    for name in with_mlp:
        mixer_class(name)  # refuses a name that no mixer has
    blind = [name for name in names if not mixer_class(name).causal]
    if causal and blind:
        raise ValueError(
            f"mixer {blind[0]!r} looks at the future and the model is causal; choose another mixer or causal=False"
        )


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1 (got {size})")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))} (got {value!r})")
