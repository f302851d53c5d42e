"""Both strands of a double helix: models that read a sequence and its reverse complement.

    rc x = complement(x), last letter first
    u = f(x);   v = f(rc x), turned back to the places of x

    "single"      features u
    "shared"      features [u, v]; logits of tokens W u + P W v, of classes (L(u) + P L(v)) / 2
    "conjoined"   features [u, v]; logits of tokens (W u + P W v) / 2, of classes (L(u) + P L(v)) / 2

P puts each letter, or class, in the place of the one that it is on the other strand. So rc x has the logits of x, last
place first and permuted by P: `"shared"` and `"conjoined"` are equivariant to the reverse complement. Both see the
letters on either side, whatever f is.

`"shared"` is Caduceus-PS (Schiff et al., arXiv 2403.03234, section 4.2), whose layers carry 2 D channels [u, v], the
second half reversed in time and channels, and reverse it before and after every layer. These reversals cancel between
layers: what is left is one at either end. `"conjoined"` averages a model that was trained on single strands, as
Caduceus-PH is used.

Shapes: B batch, T steps, D width, V tokens, C classes, N packed sequences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.checks import check_arguments, check_choice, check_range
from sinuous.core.stack import State
from sinuous.genomics.heads import HeadedModel, check_bounds, tokenizer_for
from sinuous.genomics.letters import DNA, DNATokenizer

STRANDS = ("single", "conjoined", "shared")


@dataclass(frozen=True)
class Trunk:
    """The part of a causal model ahead of its head, which reads single strands in parts of any length."""

    model: StrandedModel

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Features `[B, T, D]` of ids `[B, T]` that go on from `state`, and the state after them."""
        return self.model._read(x, state)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Features `[B, D]` of ids `[B]`, and the next state."""
        return self.model._read(x_t, state, ndim=1)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first step, on the device and in the dtype of the parameters if none is given."""
        return self.model._start(batch_size, device, dtype)


class StrandedModel(HeadedModel):
    """A `HeadedModel` of DNA that reads one strand or both.

    Args:
        vocab_size: V; `model.tokenizer` is a `DNATokenizer` where it has as many tokens, else None until it is set.
        strands: `"single"`, `"conjoined"` or `"shared"`.
        class_complement: for each class, the one that it is on the other strand (gene + and gene -); itself if absent.
        join_dim: width of a hidden layer in front of a head for positions, gelu(A u + B v + b), which reads both
            strands at once; 0 for a head that adds what each strand says.
        **model: further arguments of `HeadedModel`.

    Raises:
        ValueError: if `strands` is unknown, tokens have no complement, or an option is for another head or for both
            strands.
    """

    complement: Tensor
    class_order: Tensor

    @check_arguments
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        strands: str = "single",
        class_complement: Sequence[int] | None = None,
        join_dim: int = 0,
        head: str = "lm",
        num_classes: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **model: Any,
    ) -> None:
        check_choice("strands", strands, STRANDS)
        check_range(0, float("inf"), join_dim=join_dim)
        _check_strands(strands, vocab_size, class_complement, join_dim, head, num_classes)
        super().__init__(
            vocab_size,
            dim,
            depth,
            head=head,
            num_classes=num_classes,
            head_features=join_dim or dim,
            tokenizer=tokenizer_for(vocab_size, DNATokenizer),
            device=device,
            dtype=dtype,
            **model,
        )
        self.strands = strands
        self.class_complement = None if class_complement is None else tuple(class_complement)
        if strands != "single":
            self.causal = False
            self.num_features = 2 * dim
        self.register_buffer("complement", torch.empty(self.padded_vocab_size, dtype=torch.long, device=device), False)
        self.register_buffer("class_order", torch.empty(num_classes, dtype=torch.long, device=device), False)
        self.join_layer = nn.Linear(2 * dim, join_dim, device=device, dtype=dtype) if join_dim else None
        self._init_strands()

    def init_weights(self) -> None:
        super().init_weights()
        if hasattr(self, "join_layer"):  # not in the constructor of the base class
            self._init_strands()

    def _init_strands(self) -> None:
        with torch.device("cpu"), torch.no_grad():
            letters = DNATokenizer().complement
            self.complement.copy_(torch.arange(self.padded_vocab_size))
            if self.strands != "single":
                self.complement[: len(letters)].copy_(letters)
            order = range(self.num_classes) if self.class_complement is None else self.class_complement
            self.class_order.copy_(torch.tensor(list(order), dtype=torch.long))
        if self.join_layer is not None:
            self.join_layer.reset_parameters()

    def reverse_complement(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The other strands of ids `[B, T]`, last letter first; packed sequences stay in their places."""
        check_bounds(ids, cu_seqlens)
        known = ids.clamp(0, self.padded_vocab_size - 1)  # the embedding refuses others
        return reversed_each(self.complement[known], cu_seqlens)

    def forward_features(
        self, x: Tensor, cu_seqlens: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Features `[B, T, D]` of one strand; of both `[B, T, 2 D]`, those of the second with its channels reversed, as
        published.

        Args:
            x: ids `[B, T]`; for a single strand embeddings `[B, T, D]` do, too.
            cu_seqlens: boundaries of packed sequences, `[N + 1]`.
            position_ids: int64 `[B, T]`, for a single strand and mixers that read positions.

        Raises:
            ValueError: if both strands are to be read of embeddings or at positions of choice.
        """
        if self.strands == "single":
            return self._strand(x, cu_seqlens, position_ids)
        if position_ids is not None:
            raise ValueError(
                f"position_ids are for strands='single' (got strands={self.strands!r}); leave them out: each strand "
                "counts from its own start"
            )
        if isinstance(x, Tensor) and x.is_floating_point():
            raise ValueError(
                f"strands={self.strands!r} complements letters and needs ids [B, T] (got embeddings "
                f"{list(x.shape)}); give ids, or build the model with strands='single'"
            )
        if not isinstance(x, Tensor) or x.ndim != 2 or x.dtype not in (torch.int64, torch.int32):
            self._embed(x, 2)  # says what is wrong
        u, v = self._both(x, cu_seqlens)
        return torch.cat([u, v.flip(-1)], -1)

    def _both(self, ids: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of either strand, `[B, T, D]` each, in the places of the first, of one call with both."""
        other = self.reverse_complement(ids, cu_seqlens)
        rows, steps = ids.shape
        if cu_seqlens is None:
            features = self._strand(torch.cat([ids, other]), None, None)
            u, w = features[:rows], features[rows:]
        else:
            bounds = torch.cat([cu_seqlens, cu_seqlens[1:] + steps])
            features = self._strand(torch.cat([ids, other], 1), bounds, None)
            u, w = features[:, :steps], features[:, steps:]
        return u, reversed_each(w, cu_seqlens)

    def _strand(self, x: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Features `[B, T, D]` of a batch of single strands, or of both, first strands first."""
        return super().forward_features(x, cu_seqlens, position_ids)

    def forward_head(self, x: Tensor, ids: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits of features, as `forward_features` gives them; see `HeadedModel.forward_head`."""
        if self.strands == "single":
            return super().forward_head(x, ids, cu_seqlens)
        if x.shape[-1] != 2 * self.dim:
            raise ValueError(
                f"features of both strands are [B, T, {2 * self.dim}] (got {list(x.shape)}); give forward_head what "
                "forward_features returned"
            )
        u, v = x[..., : self.dim], x[..., self.dim :].flip(-1)
        if self.head_kind == "sequence":
            u, v = self._pooled(u, ids, cu_seqlens), self._pooled(v, ids, cu_seqlens)
        return self.join(u, v)

    def join(self, u: Tensor, v: Tensor) -> Tensor:
        """Logits of both strands' features at the same places.

        Args:
            u: features of the first strand, `[..., D]`.
            v: those of the second, in the places of the first, their channels as the model gave them.

        Raises:
            ValueError: if the model reads a single strand.
        """
        if self.strands == "single":
            raise ValueError("strands='single' has nothing to join; build the model with strands='shared'")
        if self.join_layer is not None:
            first, second = self.join_layer(torch.cat([u, v], -1)), self.join_layer(torch.cat([v, u], -1))
            u, v = F.gelu(first), F.gelu(second)
        order = self.complement if self.head_kind == "lm" else self.class_order
        both = self._logits(u) + self._logits(v)[..., order]
        return both if self.head_kind == "lm" and self.strands == "shared" else both / 2

    @property
    def trunk(self) -> Trunk:
        """The part of a model of direction causal that reads single strands, in parts, and gives features.

        So both strands of a long sequence are read in bounded memory: the second, `reverse_complement(ids)`, from its
        start with states kept, then the first; and `join` makes logits of both.

        Raises:
            ValueError: if single strands are not read causally.
        """
        self._check_parts()
        return Trunk(self)

    def _check_parts(self) -> None:
        """Refuse to read single strands in parts."""
        if not self.layers.causal:
            raise ValueError("this model reads each strand from both ends and has no causal trunk; call the model")

    def prefill(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        last_only: bool = False,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        self._check_steps()
        features, after = self._read(x, state, position_ids)
        return self.forward_head(features[:, -1:] if last_only else features), after

    def step(self, x_t: Tensor, state: State, position_ids: Tensor | None = None) -> tuple[Tensor, State]:
        self._check_steps()
        features, after = self._read(x_t, state, position_ids, ndim=1)
        return self.forward_head(features), after

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        self._check_steps()
        return self._start(batch_size, device, dtype)

    prefill.__doc__, step.__doc__ = HeadedModel.prefill.__doc__, HeadedModel.step.__doc__
    initial_state.__doc__ = HeadedModel.initial_state.__doc__

    def _read(
        self, x: Tensor, state: State | None, position_ids: Tensor | None = None, ndim: int = 2
    ) -> tuple[Tensor, State]:
        """Features of single strands that go on from `state`, `[B, T, D]`, or `[B, D]` with `ndim` 1, and the state
        after them."""
        return self._run(self._embed(x, ndim), state, position_ids, ndim)

    def _run(self, stream: Tensor, state: State | None, position_ids: Tensor | None, ndim: int) -> tuple[Tensor, State]:
        call: Any = self.layers.prefill if ndim == 2 else self.layers.step
        stream, after = call(stream, state, position_ids)
        return self._finish(stream), after

    def _start(self, batch_size: int, device: torch.device | None, dtype: torch.dtype | None) -> State:
        return self.layers.initial_state(batch_size, device, dtype)


def reversed_each(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Reverse time, axis 1, of each row; or of each packed sequence by itself, which stays in its place."""
    if cu_seqlens is None:
        return x.flip(1)
    return x.index_select(1, reversal(cu_seqlens, x.shape[1]))


def reversal(cu_seqlens: Tensor, length: int) -> Tensor:
    """For each of `length` steps, the step that mirrors it in its packed sequence."""
    first, stop = cu_seqlens[:-1], cu_seqlens[1:]
    ends = torch.repeat_interleave(first + stop - 1, stop - first, output_size=length)
    return ends - torch.arange(length, device=ends.device)


def _check_strands(
    strands: str,
    vocab_size: int,
    class_complement: Sequence[int] | None,
    join_dim: int,
    head: str,
    num_classes: int,
) -> None:
    letters = len(DNA)
    if strands != "single" and vocab_size < letters:
        raise ValueError(
            f"strands={strands!r} needs the complement of every letter: vocab_size must be the {letters} tokens of "
            f"DNATokenizer or more (got {vocab_size}); choose strands='single' for another vocabulary"
        )
    if class_complement is not None:
        if strands == "single" or head == "lm":
            raise ValueError(
                f"class_complement is for classes on both strands (got strands={strands!r}, head={head!r}); leave it "
                "out, or choose strands='shared' and a head for classes"
            )
        order = list(class_complement)
        if sorted(order) != list(range(num_classes)) or [order[i] for i in order] != list(range(num_classes)):
            raise ValueError(
                f"class_complement must name for each of the {num_classes} classes the one that it is on the other "
                f"strand, and back (got {order}); two classes that change places are [1, 0]"
            )
    if join_dim and (strands == "single" or head != "position"):
        raise ValueError(
            f"join_dim is for head='position' on both strands (got strands={strands!r}, head={head!r}); leave it out"
        )


def fit_strands(state_dict: Mapping[str, Tensor], model: StrandedModel) -> dict[str, Tensor]:
    """Authors' weights of a model of both strands, without what marks them as such; others as they are.

    Raises:
        ValueError: if the authors' model is of both strands and `model` is not, or the other way, or letters have other
            complements there.
    """
    maps = {name: tensor for name, tensor in state_dict.items() if name.endswith("complement_map")}
    authors = any("xlstm_block_stack." in name or ".mamba_fwd." in name for name in state_dict)
    if authors and bool(maps) != (model.strands == "shared"):
        theirs, remedy = ("both strands", "'shared'") if maps else ("single strands", "'single' or 'conjoined'")
        raise ValueError(
            f"the checkpoint is of the authors' model of {theirs} and the model has strands={model.strands!r}; "
            f"build it with strands={remedy}"
        )
    ours = model.complement.tolist() if maps and not model.complement.is_meta else []
    for name, tensor in maps.items():
        if ours and tensor.tolist() != ours:
            raise ValueError(
                f"the checkpoint's letters have other complements ({name} is {tensor.tolist()}) than the model's "
                f"({ours}); it is for another vocabulary"
            )
    return {
        re.sub(r"\.(submodule|embedding(?=\.weight$)|lm_head(?=\.weight$))\.", ".", name) if maps else name: tensor
        for name, tensor in state_dict.items()
        if name not in maps
    }
