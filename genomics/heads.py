"""Models of letters with a head of choice: the next or masked letter, a label for each position, or one for all.

    "lm"          logits = W features                             [B, T, D] to [B, T, V]
    "position"    logits = W features + b                         [B, T, D] to [B, T, C]
    "sequence"    logits = W mean(features at letters) + b        [B, T, D] to [B, C]; packed, to [N, C]

The mean leaves out tokens that are no letters (padding, starts, ends, masks), so that it is the same for both strands
of a double helix, and the same with and without padding behind a causal model.

Each kind of head has parameters under a name of its own, so that weights of one kind never pass for another's.

Shapes: B batch, T steps, D width, V tokens, C classes, N packed sequences.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sinuous.core.checks import check_arguments, check_choice, check_range, described
from sinuous.core.mixers import mixer_options as options_of
from sinuous.core.mixers.calls import check_boundaries
from sinuous.core.pooling import mean_over_time
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.stack import State

HEADS = ("lm", "sequence", "position")


class HeadedModel(SequenceModel):
    """A `SequenceModel` with one of three heads.

    Args:
        vocab_size: V, number of tokens.
        dim: D, width of the residual stream.
        depth: number of blocks.
        num_heads: of those mixers that have heads; their own number if absent.
        pattern: names of mixers, taken in turn and over again.
        head: `"lm"`, `"sequence"` or `"position"`.
        num_classes: C, for the last two; 0 with `"lm"`.
        tokenizer: of `sinuous.genomics.letters`, kept as `model.tokenizer`. Without one, whose `letters` are known,
            every token counts as a letter.
        mixer_options: by name of a mixer, further arguments of its constructor.
        head_features: width of what a head for classes reads; D if absent.
        **stack: further arguments of `SequenceModel`.

    Raises:
        ValueError: if `head` is unknown, or `num_classes` does not fit it.
    """

    is_letter: Tensor

    @check_arguments
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        num_heads: int | None = None,
        pattern: str | Sequence[str] = ("mlstm",),
        head: str = "lm",
        num_classes: int = 0,
        tokenizer: Any = None,
        mixer_options: Mapping[str, Mapping[str, Any]] | None = None,
        head_features: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **stack: Any,
    ) -> None:
        check_head(head, num_classes)
        names = (pattern,) if isinstance(pattern, str) else tuple(pattern)
        options = {name: dict((mixer_options or {}).get(name, {})) for name in names}
        for name in names if num_heads is not None else ():
            if "num_heads" in options_of(name):
                options[name].setdefault("num_heads", num_heads)
        if head != "lm":
            stack["tie_head"] = True  # no matrix of tokens
        super().__init__(vocab_size, dim, depth, names, options, device=device, dtype=dtype, **stack)
        self.head_kind, self.num_classes, self.tokenizer = head, num_classes, tokenizer
        letters = torch.zeros(self.padded_vocab_size, dtype=torch.bool, device=device)
        self.register_buffer("is_letter", letters, persistent=False)
        if head != "lm":
            setattr(self, f"{head}_head", nn.Linear(head_features or dim, num_classes, device=device, dtype=dtype))
        self._init_head()

    def init_weights(self) -> None:
        """Fill every parameter and buffer anew: as `SequenceModel.init_weights`; heads of classes N(0, 0.02²)."""
        super().init_weights()
        if hasattr(self, "head_kind"):  # not in the constructor of the base class
            self._init_head()

    def _init_head(self) -> None:
        if self.tokenizer is None:
            self.is_letter.fill_(True)
        else:
            self.is_letter.zero_()[self.tokenizer.letters.to(self.is_letter.device)] = True
        if self.head_kind != "lm":
            nn.init.normal_(self._class_head().weight, std=0.02)
            nn.init.zeros_(self._class_head().bias)

    def _class_head(self) -> nn.Linear:
        layer: nn.Linear = self.get_submodule(f"{self.head_kind}_head")  # type: ignore[assignment]
        return layer

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^layers\.(\d+)", None), (r"^norm_f|^head|^(sequence|position)_head", (99999,))]
        return {"stem": r"^embedding", "blocks": blocks}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """Logits of ids `[B, T]` or embeddings `[B, T, D]`.

        Args:
            x: packed sequences are `[1, ΣT]`.
            cu_seqlens: their boundaries, `[N + 1]`.
            position_ids: int64 `[B, T]`, for mixers that read positions; counted from 0 if absent.

        Returns:
            `[B, T, V]`, `[B, T, C]` or `[B, C]`, as the head is; a row for each packed sequence, `[N, C]`.
        """
        return self.forward_head(self.forward_features(x, cu_seqlens, position_ids), x, cu_seqlens)

    def forward_head(self, x: Tensor, ids: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits of features.

        Args:
            x: features `[B, T, D]`; those of single steps `[..., D]` do for heads that look at each step alone.
            ids: their tokens `[B, T]`, which tell a `"sequence"` head where letters are; all of them are, if absent.
            cu_seqlens: boundaries of packed sequences, for a `"sequence"` head.

        Raises:
            ValueError: if there are not as many tokens as features.
        """
        if self.head_kind == "sequence":
            x = self._pooled(x, ids, cu_seqlens)
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        return super().forward_head(x) if self.head_kind == "lm" else self._class_head()(x)

    def _pooled(self, x: Tensor, ids: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        if x.ndim != 3:
            raise ValueError(
                f"a head for whole sequences needs the features of their steps, [B, T, D] (got {described(x)})"
            )
        check_bounds(x, cu_seqlens)
        if ids is None or ids.is_floating_point():
            return mean_over_time(x, None, cu_seqlens)
        if ids.shape != x.shape[:2]:
            raise ValueError(
                f"ids must be those of the features, {list(x.shape[:2])} (got {list(ids.shape)}); "
                "give forward_head what forward_features was given"
            )
        return mean_over_time(x, self.is_letter[ids], cu_seqlens)

    def prefill(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, State]:
        self._check_steps()
        return super().prefill(x, *args, **kwargs)

    def step(self, x_t: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, State]:
        self._check_steps()
        return super().step(x_t, *args, **kwargs)

    prefill.__doc__, step.__doc__ = SequenceModel.prefill.__doc__, SequenceModel.step.__doc__

    def _check_steps(self) -> None:
        if not self.causal:
            raise NotImplementedError("this model looks at the future and has no state to carry; call the model")
        if self.head_kind == "sequence":
            raise NotImplementedError("head='sequence' reads the whole sequence and has no steps; call the model")


def check_head(head: str, num_classes: int) -> None:
    """Refuse a head that is unknown, or a number of classes that it cannot have.

    Raises:
        ValueError: naming the value and the remedy.
    """
    check_choice("head", head, HEADS)
    check_range(0, float("inf"), num_classes=num_classes)
    if head == "lm" and num_classes:
        raise ValueError(
            f"num_classes must be 0 with head='lm', whose logits are for tokens (got {num_classes}); "
            "choose head='sequence' or head='position' for classes"
        )
    if head != "lm" and not num_classes:
        raise ValueError(f"num_classes must be at least 1 with head={head!r} (got 0); say how many classes there are")


def check_bounds(x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Refuse boundaries that do not cut one row of tokens `[1, ΣT]` or features `[1, ΣT, D]` into sequences.

    Raises:
        ValueError: naming them.
    """
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        check_boundaries(x, cu_seqlens, None)


def tokenizer_for(vocab_size: int, *kinds: Callable[[], Any]) -> Any:
    """Make the first of some kinds of tokenizers that has so many tokens; None if there is none."""
    with torch.device("cpu"):  # also for models on meta
        return next((made for made in (kind() for kind in kinds) if made.vocab_size == vocab_size), None)


def fit_head(state: Mapping[str, Tensor], model: HeadedModel) -> dict[str, Tensor]:
    """Weights of another head out of `state`, and those of `model`'s own head, as they are, in where it has none.

    So a model that was trained to continue sequences becomes one that labels them; a warning says that its head is new.

    Raises:
        ValueError: if the model's head is for tokens, and `state` has one of classes alone.
    """
    kinds = {kind: [name for name in state if name.startswith(f"{kind}_head.")] for kind in HEADS[1:]}
    of_tokens = [name for name in state if name.startswith("head.")]
    fitted = dict(state)
    if model.head_kind == "lm":
        for kind, names in kinds.items():
            if names and (not of_tokens or model.tie_head):
                raise ValueError(
                    f"the checkpoint has a head for {len(state[names[0]])} classes and none for tokens; "
                    f"build the model with head={kind!r}, num_classes={len(state[names[0]])}"
                )
        return fitted
    ours = model.state_dict()
    # The layer that joins two strands stands in front of the head and is trained with it.
    parts = [name for name in ours if name.startswith((f"{model.head_kind}_head.", "join_layer."))]
    absent = [name for name in parts if name not in state or state[name].shape != ours[name].shape]
    if absent:
        warnings.warn(
            f"the checkpoint has no head={model.head_kind!r} for {model.num_classes} classes: "
            "the new head has random weights and must be trained",
            UserWarning,
            stacklevel=3,
        )
        fitted.update({name: ours[name] for name in absent})
    strangers = [name for kind, names in kinds.items() if kind != model.head_kind for name in names] + of_tokens
    return {name: tensor for name, tensor in fitted.items() if name not in strangers}


def check_vocabulary(state: Mapping[str, Tensor], model: HeadedModel) -> None:
    """Refuse weights of a model with another number of tokens.

    Raises:
        ValueError: naming both.
    """
    rows = state.get("embedding.weight")
    if rows is not None and len(rows) != model.padded_vocab_size:
        raise ValueError(
            f"the checkpoint has {len(rows)} tokens and the model {model.padded_vocab_size}; "
            f"build the model with vocab_size={len(rows)}, and use the tokenizer that the file was made with"
        )
