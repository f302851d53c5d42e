"""Video-Ma2mba: a recurrent language model that reads the frames of a film as tokens between those of text.

    z_n = pool(CLIP(frame_n))                       features of the last block but one, 24 × 24, pooled to 12 × 12
    y_n = W_2 gelu(W_1 z_n)                         144 tokens of a frame, as wide as the language model
    logits = Mamba-2(… text … y_1 y_2 … y_N … question …)

No attention joins frames, so that a film of any length is read with a state of one size, and with cells of some blocks
by some steps (`set_grad_checkpointing`) a film of hours is trained on in one exact backward pass.

Paper: Lee et al., "Look Every Frame All at Once: Video-Ma2mba for Efficient Long-form Video Understanding with
Multi-Axis Gradient Checkpointing" (arXiv 2411.19460), section 3. No weights are published; the parts start from CLIP
and from state-spaces' Mamba-2, see `load_parts`:

    model = sinuous.create_model("video_ma2mba_0_7b")
    load_parts(model, language="mamba2-370m/pytorch_model.bin", vision=True)
    answers = model.answer("film.mp4", ["What happens first?"], "tokenizer.json")

Shapes: B batch, T tokens, N frames, H and W pixels, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sinuous.core.checks import check_arguments, check_choice, described
from sinuous.core.registry import register_model
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.stack import State
from sinuous.video.ma2mba_files import checkpoint_filter_fn, load_parts
from sinuous.video.ma2mba_vision import build_vision, check_frames, check_range

__all__ = ["VideoMa2mba", "checkpoint_filter_fn", "load_parts"]

PARTS = ("vision", "projector", "language")

_MAMBA2: dict[str, Any] = {"vocab_size": 50277, "pattern": "mamba2", "pad_vocab_multiple": 16}

SIZES: dict[str, dict[str, Any]] = {
    "video_ma2mba_0_7b": {**_MAMBA2, "dim": 1024, "depth": 48},
    "video_ma2mba_1_8b": {**_MAMBA2, "dim": 2048, "depth": 48},
    "video_ma2mba_3_1b": {**_MAMBA2, "dim": 2560, "depth": 64},
    "test_video_ma2mba": {
        "vision": "test_vit",
        "img_size": 64,
        "vocab_size": 256,
        "dim": 64,
        "depth": 2,
        "pattern": "mamba2",
    },
}


class VideoMa2mba(nn.Module):
    """A language model that reads frames.

    Ids hold `frame_id`, which is none of the vocabulary's, `tokens_per_frame` times for every frame; the frames of a
    row stand there in their order, anywhere between its text.

    Args:
        vocab_size, dim, depth: of the language model, see `SequenceModel`.
        vision: name of the model of pictures, in timm. It is cut behind the block that is read.
        img_size: height and width of a frame in pixels, or one number for both.
        vision_block: index of that block; -2 is the last but one.
        pooled: side of the squares of features that become one token.
        **language: further arguments of `SequenceModel`: `pattern` with any causal mixers, `mixer_options`, `mlp`, ….

    Attributes:
        frame_id: stands for a token of a frame; `vocab_size`.
        tokens_per_frame: tokens of each frame.
        frame_group: frames that are encoded at once.
        vision_lr: learning rate of `vision` where it is not that of the rest, see `train_only`.

    Raises:
        ValueError: if an argument of either part is not allowed, or the language model looks ahead.
        TypeError: if `SequenceModel` has no such argument.
    """

    causal = True

    @check_arguments
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        vision: str = "vit_large_patch14_clip_quickgelu_336",
        img_size: int | tuple[int, int] = 336,
        vision_block: int = -2,
        pooled: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **language: Any,
    ) -> None:
        super().__init__()
        if not language.get("causal", True):
            raise ValueError("causal must be True, as a film is read from its start (got False); leave it out")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.vision, self.reading = build_vision(vision, img_size, vision_block, pooled, **dd)
        width = self.reading.width
        self.projector = nn.Sequential(nn.Linear(width, dim, **dd), nn.GELU(), nn.Linear(dim, dim, **dd))
        self.language = SequenceModel(vocab_size, dim, depth, **language, **dd)
        self.num_features = self.embed_dim = self.dim = dim
        self.vocab_size, self.padded_vocab_size = vocab_size, self.language.padded_vocab_size
        self.frame_id = vocab_size
        self.tokens_per_frame = self.reading.grid[0] * self.reading.grid[1]
        self.frame_group = 8
        self.vision_lr: float | None = None

    def no_weight_decay(self) -> set[str]:
        of_vision: set[str] = getattr(self.vision, "no_weight_decay", set)()
        return {f"vision.{n}" for n in of_vision} | {f"language.{n}" for n in self.language.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^vision|^projector|^language\.embedding",
            "blocks": [(r"^language\.layers\.(\d+)", None), (r"^language\.(?:norm_f|head)", (99999,))],
        }

    def learning_rates(self) -> dict[str, float]:
        if self.vision_lr is None:
            return {}
        return {f"vision.{name}": self.vision_lr for name, p in self.vision.named_parameters() if p.requires_grad}

    def train_only(self, *parts: str, vision_lr: float | None = None) -> None:
        """Train some parts and freeze the others.

        Args:
            *parts: of `vision`, `projector`, `language`.
            vision_lr: learning rate of `vision`, which `sinuous train` then gives it; that of the rest, if absent.

        Raises:
            ValueError: if there is no such part.
        """
        for part in parts:
            check_choice("parts", part, PARTS)
        for part in PARTS:
            self.get_submodule(part).requires_grad_(part in parts)
        self.vision_lr = vision_lr

    def set_grad_checkpointing(self, enable: bool = True, *, layers: int = 1, steps: int | None = None) -> None:
        """Recompute blocks of `language` in the backward pass instead of keeping their activations, `layers` by `steps`
        at a time: see `SequenceModel.set_grad_checkpointing`. Groups of frames are always recomputed.

        Raises:
            ValueError: if a size is less than 1.
        """
        self.language.set_grad_checkpointing(enable, layers=layers, steps=steps)

    def encode(self, frames: Tensor) -> Tensor:
        """Tokens `[F, tokens_per_frame, D]` of frames `[F, 3, H, W]`, as `forward` takes them, in groups.

        Where `vision` is frozen, it runs without gradients, also of the frames. Where it is trained, each group runs
        again in the backward pass."""
        return torch.cat(list(self._groups(frames))) if len(frames) else self._tokens(frames)

    def _groups(self, frames: Tensor) -> Iterator[Tensor]:
        trained = any(p.requires_grad for p in self.vision.parameters())
        for group in frames.split(self.frame_group):
            check_range(group)
            if not torch.is_grad_enabled():
                yield self._tokens(group)
            elif trained:
                yield checkpoint(self._tokens, group, use_reentrant=False)
            else:
                with torch.no_grad():
                    features = self.reading.features(self.vision, group)
                yield checkpoint(self._project, features, use_reentrant=False)

    def _tokens(self, frames: Tensor) -> Tensor:
        return self._project(self.reading.features(self.vision, frames))

    def _project(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.projector(features.to(next(self.projector.parameters()).dtype))
        return tokens.to(self.language.embedding.weight.dtype)

    def forward(
        self,
        ids: Tensor,
        frames: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits `[B, T, padded_vocab_size]` of text with frames in it.

        Args:
            ids: int64 `[B, T]`, with `frame_id` where frames stand.
            frames: pixels `[B, N, 3, H, W]`: uint8 from 0 to 255, or floats from 0 to 1; the model takes off mean and
                deviation. `None` for text alone.
            cu_seqlens, position_ids: as in `SequenceModel.forward`.

        Raises:
            ValueError: if the places of frames in a row are not as many as its frames have tokens, or a shape, dtype
                or range is wrong.
        """
        logits: Tensor = self.language(self.embed(ids, frames), cu_seqlens, position_ids)
        return logits

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        frames: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy of the logits with targets, in nats: see `SequenceModel.loss`. Of a batch with frames, the
        embeddings `[B, T, D]` are kept beside what checkpoints are.

        Args:
            ids, frames, cu_seqlens, position_ids: as in `forward`.
            targets: int64 `[B, T]`; `ignore_index` where the next token is one of a frame.
            ignore_index, reduction: as in `SequenceModel.loss`.

        Raises:
            ValueError: as `forward` and `SequenceModel.loss`.
        """
        options = {"cu_seqlens": cu_seqlens, "position_ids": position_ids}
        x = self.embed(ids, frames)
        return self.language.loss(x, targets, ignore_index=ignore_index, reduction=reduction, **options)

    def prefill(
        self,
        ids: Tensor,
        frames: Tensor | None = None,
        state: State | None = None,
        *,
        last_only: bool = False,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Read a part of a text with whole frames in it, and go on from `state`.

        Args:
            ids, frames: as in `forward`.
            state: what an earlier call returned; `None` at the start.
            last_only: compute the logits of the last step alone.
            position_ids: as in `SequenceModel.prefill`.

        Returns:
            Logits `[B, T, padded_vocab_size]`, or `[B, 1, padded_vocab_size]`, and the state after the last step.

        Raises:
            ValueError: as `forward`.
        """
        x = self.embed(ids, frames)
        return self.language.prefill(x, state, last_only=last_only, position_ids=position_ids)

    def step(self, ids_t: Tensor, state: State, position_ids: Tensor | None = None) -> tuple[Tensor, State]:
        """One step of text: ids `[B]` to logits `[B, padded_vocab_size]` and the next state."""
        return self.language.step(ids_t, state, position_ids)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first step, see `SequenceModel.initial_state`."""
        return self.language.initial_state(batch_size, device, dtype)

    def answer(
        self, path: Any, questions: str | Sequence[str], tokenizer_file: Any = None, **options: Any
    ) -> list[str]:
        """Answers to questions on a film, which is read once: see `sinuous.video.answering.answer`."""
        from sinuous.video.answering import answer

        return answer(self, path, questions, tokenizer_file, **options)

    def embed(self, ids: Tensor, frames: Tensor | None = None) -> Tensor:
        """What the language model reads: embeddings `[B, T, D]` of text and frames, or the ids of text alone.

        Raises:
            ValueError: as `forward`.
        """
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2:
            raise ValueError(f"ids must be int64 [B, T] (got {described(ids)}); give ids of text and frames")
        if frames is not None:
            check_frames(frames, len(ids), self.reading.sides)
        if ids.is_meta:
            return ids
        is_frame = ids == self.frame_id
        self._check_places(is_frame, 0 if frames is None else frames.shape[1])
        if frames is None or not frames.shape[1]:
            return ids
        is_frame = is_frame.flatten()
        text, places = (~is_frame).nonzero().squeeze(1), is_frame.nonzero().squeeze(1)
        rows = [self.language.look_up(ids.flatten()[text])]
        rows += [tokens.flatten(0, 1) for tokens in self._groups(frames.flatten(0, 1))]
        order = torch.empty_like(is_frame, dtype=torch.long)
        order[torch.cat([text, places])] = torch.arange(len(order), device=order.device)
        return torch.cat(rows).index_select(0, order).view(*ids.shape, self.dim)

    def _check_places(self, is_frame: Tensor, frames: int) -> None:
        expected = frames * self.tokens_per_frame
        counts = is_frame.sum(1)
        if bool((counts != expected).any()):
            row = int((counts != expected).int().argmax())
            raise ValueError(
                f"ids must hold frame_id={self.frame_id} {expected} times, {self.tokens_per_frame} for each of the "
                f"{frames} frames (got {int(counts[row])} times in row {row}); give as many frames as ids have room for"
            )


def _cfgs() -> dict[str, Any]:
    cfg: dict[str, Any] = {
        "num_classes": _MAMBA2["vocab_size"],
        "input_size": (2048,),
        "classifier": "language.head",
        "first_conv": "language.embedding",
        "license": "apache-2.0",
        "paper_name": "Look Every Frame All at Once: Video-Ma2mba for Efficient Long-form Video Understanding with "
        "Multi-Axis Gradient Checkpointing",
        "paper_ids": "arXiv:2411.19460",
        "origin_url": "https://github.com/klae01/ma2mba",
    }
    cfgs = {f"{name}.untrained": cfg for name in SIZES}
    cfgs["test_video_ma2mba.untrained"] = {**cfg, "num_classes": 256, "input_size": (256,)}
    return cfgs


default_cfgs = generate_default_cfgs(_cfgs())


def _create(variant: str, **kwargs: Any) -> VideoMa2mba:
    build: Callable[..., VideoMa2mba] = VideoMa2mba
    return build(**{**SIZES[variant], **kwargs})


@register_model(domain="video")
def video_ma2mba_0_7b(pretrained: bool = False, **kwargs: Any) -> VideoMa2mba:
    """Video-Ma2mba on Mamba2-370m."""
    return _create("video_ma2mba_0_7b", **kwargs)


@register_model(domain="video")
def video_ma2mba_1_8b(pretrained: bool = False, **kwargs: Any) -> VideoMa2mba:
    """Video-Ma2mba on Mamba2-1.3b."""
    return _create("video_ma2mba_1_8b", **kwargs)


@register_model(domain="video")
def video_ma2mba_3_1b(pretrained: bool = False, **kwargs: Any) -> VideoMa2mba:
    """Video-Ma2mba on Mamba2-2.7b: 45.2 % on Video-MME in the paper."""
    return _create("video_ma2mba_3_1b", **kwargs)


@register_model(domain="video")
def test_video_ma2mba(pretrained: bool = False, **kwargs: Any) -> VideoMa2mba:  # noqa: PT028
    """For tests: bytes, and frames of 64 pixels through timm's `test_vit`."""
    return _create("test_video_ma2mba", **kwargs)
