"""One backbone for sequences of tokens: an embedding, residual blocks around mixers chosen by name, and a head.

    x_0 = embedding(ids)                                  the residual stream, in fp32 unless told otherwise
    x ← x + mixer(norm(x));  x ← x + mlp(norm(x))         `depth` times, the mixers taken in turn from `pattern`
    logits = norm_f(x) Wᵀ                                 W the embedding itself, or a matrix of its own

Names of parameters follow state-spaces/mamba without its `backbone.` (embedding, layers.N.norm, layers.N.mixer,
layers.N.norm2, layers.N.mlp, norm_f), so that a pattern `("mamba",)` is the language model of Gu and Dao
(arXiv 2312.00752, section 3.4), `("mamba2",)` that of Dao and Gu (arXiv 2405.21060), and several names make a hybrid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.blocks import ResidualBlock, Sharing, SharingBlock
from sinuous.core.cells import Cells, Ends
from sinuous.core.checks import check_arguments, check_choice, check_positive, check_range, check_sizes, described
from sinuous.core.parts import NORMS
from sinuous.core.stack import Stack, State
from sinuous.core.token_loss import TokenLoss, check_targets, explain_targets


class SequenceModel(nn.Module):
    """A language model, a masked model, or an encoder, of any registered mixers.

    Args:
        vocab_size: number of tokens.
        dim: width of the residual stream.
        depth: number of blocks.
        pattern: names of mixers, taken in turn and over again; one name stands for itself.
        mixer_options: for each name of the pattern that needs any, keyword arguments of its constructor. Mixers that
            have `num_blocks` or `block_index` are told `depth` and their place; those that share with their name in
            later blocks (rwkv7 its first values) read, in each but the first of them, the shared tensors.
        mlp: `"none"`, `"gelu"`, `"geglu"` or `"swiglu"`, after every mixer; or one of them for each name whose mixers
            have one, others having none.
        mlp_ratio: width of the MLP between its layers, over `dim`.
        mlp_multiple_of: that width is rounded to a multiple of this, `mlp_rounding` `"up"` or `"down"`.
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
        weight_init: `"gpt2"`, `"xlstm"` or `"small"`, how embedding, head and MLPs start; see `init_weights`.
        drop_rate: dropout after the embedding and inside the MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        blocks: classes of the blocks, as in `Stack`.

    Shapes: B batch, T steps. Packed sequences are `[1, ΣT]` with `cu_seqlens`.

    Raises:
        ValueError: if a size or a choice is not allowed, a mixer is unknown or is not causal in a causal model, or
            options are for a mixer that is not in the pattern.
    """

    @check_arguments
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
        mlp_rounding: str = "up",
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
        blocks: tuple[type[ResidualBlock], type[Sharing]] = (ResidualBlock, SharingBlock),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_sizes(vocab_size=vocab_size, dim=dim, depth=depth, pad_vocab_multiple=pad_vocab_multiple)
        check_positive(logit_cap=logit_cap)
        check_range(0, 1, drop_rate=drop_rate)
        self.vocab_size = vocab_size
        self.padded_vocab_size = math.ceil(vocab_size / pad_vocab_multiple) * pad_vocab_multiple
        self.num_features = self.embed_dim = self.dim = dim
        self.depth = depth
        self.causal = causal
        self.tie_head = tie_head
        self.logit_cap = logit_cap
        self.residual_in_fp32 = residual_in_fp32
        self.weight_init = weight_init

        self.embedding = nn.Embedding(self.padded_vocab_size, dim, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.layers = Stack(
            dim,
            depth,
            pattern,
            mixer_options,
            mlp=mlp,
            mlp_ratio=mlp_ratio,
            mlp_multiple_of=mlp_multiple_of,
            mlp_rounding=mlp_rounding,
            mlp_bias=mlp_bias,
            norm=norm,
            norm_eps=norm_eps,
            norm_placement=norm_placement,
            causal=causal,
            residual_in_fp32=residual_in_fp32,
            weight_init=weight_init,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            blocks=blocks,
            **dd,
        )
        self.norm_f = NORMS[norm](dim, eps=norm_eps, **dd) if final_norm else nn.Identity()
        self.head = None if tie_head else nn.Linear(dim, self.padded_vocab_size, bias=False, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter and buffer anew: blocks as in `Stack.init_weights`, embedding and head N(0, 0.02²), or
        N(0, 2 / (5 dim)) with `"xlstm"` and `"small"`."""
        self.layers.init_weights()
        if not isinstance(self.norm_f, nn.Identity):
            cast("norms.RMSNorm", self.norm_f).reset_parameters()
        deviation = 0.02 if self.weight_init == "gpt2" else math.sqrt(2 / (5 * self.dim))
        nn.init.normal_(self.embedding.weight, std=deviation)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=deviation)

    def no_weight_decay(self) -> set[str]:
        return {f"layers.{name}" for name in self.layers.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^embedding", "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f|^head", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True, *, layers: int = 1, steps: int | None = None) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations, `layers` at a time and, in a
        causal model, `steps` at a time: see `Stack.set_grad_checkpointing`. Choose them by `plan_memory`.

        Raises:
            ValueError: if a size is less than 1, or `steps` is given and the model is not causal.
        """
        if steps is not None and not self.causal:
            raise ValueError(f"steps={steps} is for causal models (got one with causal=False); leave steps out")
        self.layers.set_grad_checkpointing(enable, layers=layers, steps=steps)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """Logits `[B, T, padded_vocab_size]` of ids `[B, T]` or embeddings `[B, T, dim]`.

        `position_ids`, int64 `[B, T]`, are for mixers that read positions, others ignore them; positions count from 0
        in each sequence if absent."""
        return self.forward_head(self.forward_features(x, cu_seqlens, position_ids))

    def forward_features(
        self, x: Tensor, cu_seqlens: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Features `[B, T, dim]` that the head reads; arguments as in `forward`."""
        return self._finish(self.layers(self._embed(x, 2), cu_seqlens, position_ids=position_ids))

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits of features `[..., dim]`."""
        logits = F.linear(x, self.embedding.weight if self.head is None else self.head.weight)
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)

    def loss(
        self,
        x: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy of the logits with targets, in nats, without the logits of all steps at once.

            loss_t = -log softmax(logits_t)[targets_t]        0 where the target is `ignore_index`

        The head runs at the targets that count, in pieces. With `set_grad_checkpointing` of a causal model, embedding
        and head are parts of the cells, so that of ids nothing of `[B, T, dim]` is kept but checkpoints.

        Args:
            x: ids `[B, T]` or embeddings `[B, T, dim]`.
            targets: int64 `[B, T]`, below `padded_vocab_size`.
            ignore_index: the target of steps that do not count.
            reduction: `"mean"` over the targets that count, 0 if there is none; `"none"`, `[B, T]`.
            cu_seqlens, position_ids: as in `forward`.

        Raises:
            ValueError: if `targets` has another shape or dtype, or a target is none of the vocabulary's.
        """
        check_choice("reduction", reduction, ("mean", "none"))
        check_targets(targets, x)
        stack, blocks = self.layers, list(self.layers)
        ends = [p for name, p in self.named_parameters() if not name.startswith("layers.")]
        in_cells = stack.grad_checkpointing and stack.causal and cu_seqlens is None and self._is_plain(blocks)
        try:
            if in_cells and torch.is_grad_enabled():
                logits = TokenLoss(self._logits_of, ends, ignore_index, self.padded_vocab_size)
                inside = Ends(lambda part: self._embed(part, 2), list(self.embedding.parameters()), logits)
                cells = Cells(blocks, stack.checkpoint_layers, stack.checkpoint_steps or None, inside)
                losses, _ = cells(x, targets=targets, position_ids=position_ids)
            else:
                features = self.forward_features(x, cu_seqlens, position_ids)
                losses = TokenLoss(self.forward_head, ends, ignore_index, self.padded_vocab_size)(features, targets)
        except IndexError:
            explain_targets(targets, ignore_index, self.padded_vocab_size)
            raise
        return losses if reduction == "none" else losses.sum() / (targets != ignore_index).sum().clamp(min=1)

    def _is_plain(self, blocks: Sequence[Any]) -> bool:
        """Whether there is nothing but an embedding before the blocks, and after them a head that looks at each step by
        itself; with weights of its own, which are not split among processes."""
        plain = type(self).forward_features is SequenceModel.forward_features
        return plain and not any(hasattr(block, "unshard") for block in blocks)

    def _logits_of(self, stream: Tensor) -> Tensor:
        return self.forward_head(self._finish(stream))

    def prefill(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        last_only: bool = False,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Read a part of a sequence and go on from `state`.

        Args:
            x: ids `[B, T]` or embeddings `[B, T, dim]`.
            state: what an earlier call returned; `None` at the start of a sequence.
            last_only: compute the logits of the last step alone.
            position_ids: int64 `[B, T]`, for mixers that read positions, others ignore them; they go on from the last
                one in `state` if absent.

        Returns:
            Logits `[B, T, padded_vocab_size]`, or `[B, 1, padded_vocab_size]`, and the state after the last step.

        Raises:
            NotImplementedError: if the model is not causal.
        """
        x, after = self.layers.prefill(self._embed(x, 2), state, position_ids)
        return self.forward_head(self._finish(x[:, -1:] if last_only else x)), after

    def step(self, x_t: Tensor, state: State, position_ids: Tensor | None = None) -> tuple[Tensor, State]:
        """One step: ids `[B]` or embeddings `[B, dim]` to logits `[B, padded_vocab_size]` and the next state.

        `position_ids`, int64 `[B]`, are for mixers that read positions; the next ones if absent.

        Raises:
            NotImplementedError: if the model is not causal.
        """
        x, after = self.layers.step(self._embed(x_t, 1), state, position_ids)
        return self.forward_head(self._finish(x)), after

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first step, on the device and in the dtype of the parameters if none is given.

        Raises:
            NotImplementedError: if the model is not causal.
        """
        return self.layers.initial_state(batch_size, device, dtype)

    def _embed(self, x: Tensor, ndim: int) -> Tensor:
        if not isinstance(x, Tensor):
            raise ValueError(
                f"x must be a tensor of ids or embeddings (got {described(x)}); convert it with torch.tensor"
            )
        if x.is_floating_point():
            if x.ndim != ndim + 1 or x.shape[-1] != self.dim:
                wanted = "[B, T, dim]" if ndim == 2 else "[B, dim]"
                raise ValueError(f"embeddings must be {wanted} with dim {self.dim} (got {list(x.shape)})")
        else:
            if x.ndim != ndim:
                raise ValueError(f"ids must be {'[B, T]' if ndim == 2 else '[B]'} (got {list(x.shape)})")
            if x.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"ids must be int64 or int32 (got {x.dtype}); convert them with .long()")
            x = self.look_up(x)
        x = self.drop(x)
        return norms.at_least_fp32(x) if self.residual_in_fp32 else x

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, `[..., dim]` of ids `[...]`.

        Raises:
            ValueError: if an id is none of the vocabulary's.
        """
        if ids.is_meta and not self.embedding.weight.is_meta:
            raise ValueError(f"ids are on meta, without data (got {list(ids.shape)}); give ids on the model's device")
        try:
            rows: Tensor = self.embedding(ids)
        except IndexError:
            raise ValueError(
                f"ids must lie between 0 and {self.padded_vocab_size - 1} (got {int(ids.min())} to {int(ids.max())}); "
                "use the tokenizer that the model was trained with"
            ) from None
        return rows

    def _finish(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm_f(x)
        return normed.to(self.embedding.weight.dtype)
