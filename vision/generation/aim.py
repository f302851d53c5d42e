r"""AiM: pictures as codes in raster order, each predicted from those before it and from the class by causal Mamba-2.

    x₀ = E_class(y);   x_{t+1} = E_code(z_t) + P_{t + position_offset}
    x ← x + g ⊙ mixer(RMSNorm(x) ⊙ (1 + a) + b)                       `depth` times; b, a, g from E_class(y)
    logits = E_code (RMSNorm'(RMSNorm(x)) ⊙ (1 + a) + b)

Each block has a matrix of its own that makes b, a and g (`adaln_groups=0`), or `adaln_groups` of them are shared by the
blocks in turn, to each of which a table of its own is added.

Paper: Li et al., "Scalable Autoregressive Image Generation with Mamba" (arXiv 2408.12245). Reference:
https://github.com/hp-l33/AiM (MIT). This is an independent implementation with the reference's names of parameters,
without their `mamba.backbone.`; it reads the files that the authors publish:

    model = sinuous.create_model("aim_b", checkpoint_path="model.safetensors")

Code t takes row t + position_offset of the positions: 0 as the reference trains, 1 as its decoding does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from sinuous.core.checkpoints import unwrapped
from sinuous.core.checks import check_arguments, check_range, check_sizes, described
from sinuous.core.mixers import Mixer, build_mixer, mixer_class
from sinuous.core.norms import RMSNorm
from sinuous.core.registry import check_weights
from sinuous.vision.generation.lamamba_diff import LabelEmbedder

__all__ = ["AiM", "AiMState"]


class AiMState(NamedTuple):
    """All that is kept between two codes: the blocks' b, a and g `[B, depth, 3, D]`, the last b and a `[B, 2, D]`, the
    number of codes so far `[B]`, and the states of the mixers. It does not grow."""

    modulation: Tensor
    final: Tensor
    position: Tensor
    mixers: tuple[Any, ...]


class Embeddings(nn.Module):
    """Codes and their places, `[B, T]` to `[B, T, D]`."""

    def __init__(self, vocab_size: int, places: int, dim: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, dim)
        self.position_embeddings = nn.Embedding(places, dim)

    def forward(self, codes: Tensor, positions: Tensor) -> Tensor:
        return cast("Tensor", self.word_embeddings(codes) + self.position_embeddings(positions))


class AiMBlock(nn.Module):
    """Norm, mixer, and what shifts, scales and gates them."""

    def __init__(self, dim: int, mixer: Mixer, grouped: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.mixer = mixer
        if grouped:
            self.scale_shift_table = nn.Parameter(torch.empty(1, 3, dim))
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))

    def modulation(self, condition: Tensor) -> Tensor:
        """Shift, scale and gate `[B, 3, D]`, from the class `[B, D]`, or from its group's `[B, 3, D]`."""
        if hasattr(self, "scale_shift_table"):
            return self.scale_shift_table + condition
        return cast("Tensor", self.adaLN_modulation(condition).unflatten(-1, [3, -1]))

    def forward(self, x: Tensor, modulation: Tensor, state: Any = None, how: str = "forward") -> tuple[Tensor, Any]:
        """The residual stream `[B, T, D]` and, where one is carried, the mixer's next state."""
        shift, scale, gate = modulation.unsqueeze(2).unbind(1)
        h = self.norm(x) * (1 + scale) + shift
        if how == "forward":
            y = self.mixer(h)
        elif how == "prefill":
            y, state = self.mixer.prefill(h, state)
        else:
            y, state = self.mixer.step(h.squeeze(1), state)
            y = y.unsqueeze(1)
        return x + gate * y, state


class FinalLayer(nn.Module):
    """A second norm, shifted and scaled by the class."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def modulation(self, condition: Tensor) -> Tensor:
        """Shift and scale, `[B, 2, D]`."""
        return cast("Tensor", self.adaLN_modulation(condition).unflatten(-1, [2, -1]))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.unsqueeze(2).unbind(1)
        return cast("Tensor", self.norm_final(x) * (1 + scale) + shift)


class AiM(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """AiM's model of codes.

    Args:
        vocab_size: V, number of codes.
        num_tokens: codes of a picture.
        num_classes: of the condition; one more row is for no class.
        embed_dim: D, width of the residual stream.
        depth: number of blocks.
        adaln_groups: matrices that make shift, scale and gate, shared by the blocks in turn; 0 for one in each block.
        mixer: a causal mixer by name.
        mixer_options: keyword arguments of the mixer.
        position_offset: code t takes row t + position_offset of the positions, 0 or 1.

    Raises:
        ValueError: if a size is not allowed or the mixer is not causal.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["AiMBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["A_log", "dt_bias"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["embeddings", "norm", "A_log", "dt_bias"]

    @register_to_config
    @check_arguments
    def __init__(
        self,
        vocab_size: int = 16384,
        num_tokens: int = 256,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 24,
        adaln_groups: int = 0,
        mixer: str = "mamba2",
        mixer_options: Mapping[str, Any] | None = None,
        position_offset: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, num_tokens=num_tokens, num_classes=num_classes + 1)
        check_sizes(embed_dim=embed_dim, depth=depth, adaln_groups=adaln_groups + 1)
        check_range(0, 1, position_offset=position_offset)
        if not mixer_class(mixer).causal:
            raise ValueError(
                f"mixer {mixer!r} looks at the future and codes are predicted from the past; choose another"
            )
        self.vocab_size, self.num_tokens, self.num_classes = vocab_size, num_tokens, num_classes
        self.position_offset, self.adaln_groups = position_offset, adaln_groups
        self.gradient_checkpointing = False
        self.embeddings = Embeddings(vocab_size, num_tokens + 1, embed_dim)
        self.cls_embed = LabelEmbedder(num_classes, embed_dim)
        self.adaln_group: nn.Module = nn.Identity()
        if adaln_groups > 0:
            self.adaln_group = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, adaln_groups * 3 * embed_dim))
        self.layers = nn.ModuleList(
            AiMBlock(embed_dim, build_mixer(mixer, embed_dim, **(mixer_options or {})), adaln_groups > 0)
            for _ in range(depth)
        )
        self.norm_f = RMSNorm(embed_dim)
        self.final_layer = FinalLayer(embed_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter anew, as the reference starts: blocks' own matrices of shifts, scales and gates at zero,
        those of groups at random; what mixers write is divided by the root of the depth."""
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self._blocks():
            block.mixer.init_weights()
            with torch.no_grad():
                for name in block.mixer.output_weights():
                    block.mixer.get_parameter(name).div_(math.sqrt(len(self.layers)))
            if self.adaln_groups > 0:
                nn.init.normal_(block.scale_shift_table, std=block.scale_shift_table.shape[-1] ** -0.5)
        if isinstance(self.adaln_group, nn.Sequential):
            layer = cast("nn.Linear", self.adaln_group[1])
            layer.reset_parameters()
            nn.init.zeros_(cast("Tensor", layer.bias))
        own = [] if self.adaln_groups > 0 else [block.adaLN_modulation for block in self._blocks()]
        for modulation in (self.final_layer.adaLN_modulation, *own):
            for parameter in modulation.parameters():
                nn.init.zeros_(parameter)

    def forward(self, codes: Tensor, class_labels: Tensor | int | None = None) -> Tensor:
        """Logits `[B, T + 1, V]`; row t is of code t, from the codes before it.

        Args:
            codes: int64 `[B, T]`, T from 0 to `num_tokens` - 1, one fewer than a picture has; all of them, too.
            class_labels: `[B]`, or one for all; numbers from `num_classes` on, and absent ones, are no class.

        Raises:
            ValueError: if a shape is another or there are too many codes.
        """
        if codes.ndim != 2 or codes.shape[1] > self.num_tokens:
            raise ValueError(
                f"codes must have shape [B, T] with T up to {self.num_tokens} (got {list(codes.shape)}); give the "
                "codes of one picture a row"
            )
        condition = self._condition(class_labels, codes.shape[0])
        positions = torch.arange(codes.shape[1], device=codes.device) + self.position_offset
        x = torch.cat([condition.unsqueeze(1), self.embeddings(codes, positions.expand_as(codes))], 1)
        modulation = self._modulation(condition)
        for k, block in enumerate(self._blocks()):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, _ = self._gradient_checkpointing_func(block, x, modulation[:, k])
            else:
                x, _ = block(x, modulation[:, k])
        return self._logits(x, self.final_layer.modulation(condition))

    def start(self, class_labels: Tensor | int | None) -> tuple[Tensor, AiMState]:
        """Logits `[B, V]` of the first code, and the state before it.

        Args:
            class_labels: `[B]`, or one number; as in `forward`.
        """
        batch = class_labels.shape[0] if isinstance(class_labels, Tensor) and class_labels.ndim else 1
        condition = self._condition(class_labels, batch)
        modulation = self._modulation(condition)
        x, mixers = condition.unsqueeze(1), []
        for k, block in enumerate(self._blocks()):
            x, state = block(x, modulation[:, k], None, "prefill")
            mixers.append(state)
        position = torch.zeros(batch, dtype=torch.long, device=x.device)
        final = self.final_layer.modulation(condition)
        return self._logits(x, final)[:, 0], AiMState(modulation, final, position, tuple(mixers))

    def step(self, codes: Tensor, state: AiMState) -> tuple[Tensor, AiMState]:
        """Logits `[B, V]` of the next code after `codes` `[B]`, and the state before it.

        Raises:
            ValueError: if the picture has all its codes.
        """
        if not torch.compiler.is_compiling() and int(state.position.max()) >= self.num_tokens:
            raise ValueError(f"a picture has {self.num_tokens} codes (got one more); call start for the next")
        x = self.embeddings(codes.unsqueeze(1), state.position.unsqueeze(1) + self.position_offset)
        mixers = []
        for k, (block, before) in enumerate(zip(self._blocks(), state.mixers, strict=True)):
            x, after = block(x, state.modulation[:, k], before, "step")
            mixers.append(after)
        return self._logits(x, state.final)[:, 0], state._replace(position=state.position + 1, mixers=tuple(mixers))

    def fit_weights(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """The authors' weights, or our own, as this model has them; those of the tokenizer beside them are left out.

        Raises:
            ValueError: if the weights are of another model, or have a head that is not the embedding of codes.
        """
        prefix = "mamba."
        state = unwrapped(state_dict)
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
        head, embedding = state.pop("lm_head.weight", None), state.get("embeddings.word_embeddings.weight")
        if head is not None and embedding is None:
            state["embeddings.word_embeddings.weight"] = head
        elif head is not None and not torch.equal(head, cast("Tensor", embedding)):
            raise ValueError("the checkpoint has a head of its own and this model's is its embedding of codes")
        check_weights(state, self)
        return state

    def _blocks(self) -> list[AiMBlock]:
        return [cast("AiMBlock", block) for block in self.layers]

    def _condition(self, class_labels: Tensor | int | None, batch: int) -> Tensor:
        table = self.cls_embed.embedding_table.weight
        labels = torch.as_tensor(self.num_classes if class_labels is None else class_labels, device=table.device)
        if labels.ndim > 1 or (labels.ndim == 1 and labels.shape[0] not in (1, batch)):
            raise ValueError(f"class_labels must have shape [{batch}] or be a number (got {described(class_labels)})")
        return cast("Tensor", self.cls_embed(labels.expand(batch)))

    def _modulation(self, condition: Tensor) -> Tensor:
        """Shift, scale and gate of every block, `[B, depth, 3, D]`."""
        shared = self.adaln_group(condition)
        if self.adaln_groups == 0:
            return torch.stack([block.modulation(shared) for block in self._blocks()], 1)
        groups = shared.unflatten(-1, [self.adaln_groups, 3, -1])
        return torch.stack([b.modulation(groups[:, k % self.adaln_groups]) for k, b in enumerate(self._blocks())], 1)

    def _logits(self, x: Tensor, final: Tensor) -> Tensor:
        return F.linear(self.final_layer(self.norm_f(x), final), self.embeddings.word_embeddings.weight)
