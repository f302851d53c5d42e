"""Names of the models that make pictures, and what their files hold. Their classes are loaded when one is built.

LaMamba-Diff's authors publish one size, XL. The widths of S, B and L are inferred here from the paper, by which their
parameters are about those of DiT at each size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from sinuous.core.extras import package
from sinuous.core.registry import check_weights, register_model
from sinuous.core.weights import shipped_cfgs

if TYPE_CHECKING:
    from sinuous.vision.generation.aim import AiM
    from sinuous.vision.generation.lamamba_diff import LaMambaDiff

SIZES: dict[str, dict[str, Any]] = {
    "lamamba_diff_s": {"embed_dim": 64, "num_heads": 8},
    "lamamba_diff_b": {"embed_dim": 128, "num_heads": 8},
    "lamamba_diff_l": {"embed_dim": 256, "num_heads": 8},
    "lamamba_diff_xl": {"embed_dim": 320, "num_heads": 16},
    "lamamba_diff_nano": {
        "sample_size": 32,
        "in_channels": 1,
        "out_channels": 1,
        "num_classes": 10,
        "embed_dim": 20,
        "depths": [1, 1, 1, 1],
        "bottleneck_depth": 1,
        "num_heads": 4,
        "patch_size": 2,
        "d_state": 1,
        "mlp_ratio": 2.0,
    },
    "test_lamamba_diff": {
        "sample_size": 8,
        "num_classes": 10,
        "embed_dim": 16,
        "depths": [1, 2, 1, 1],
        "bottleneck_depth": 1,
        "num_heads": 2,
        "window_size": 4,
        "d_state": 2,
        "mlp_ratio": 2.0,
    },
    "aim_b": {"embed_dim": 768, "depth": 24},
    "aim_l": {"embed_dim": 1024, "depth": 48, "adaln_groups": 4},
    "aim_xl": {"embed_dim": 1536, "depth": 48, "adaln_groups": 4},
    "aim_nano": {
        "vocab_size": 256,
        "num_tokens": 49,
        "num_classes": 10,
        "embed_dim": 128,
        "depth": 6,
        "adaln_groups": 2,
        "mixer_options": {"d_state": 32, "headdim": 32},
    },
    "vq_nano": {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [16, 32, 64],
        "latent_channels": 64,
        "sample_size": 28,
        "num_vq_embeddings": 256,
        "norm_num_groups": 8,
        "vq_embed_dim": 4,
        "scaling_factor": 1.0,
        "mid_block_add_attention": False,
    },
    "test_aim": {
        "vocab_size": 16,
        "num_tokens": 9,
        "num_classes": 10,
        "embed_dim": 16,
        "depth": 3,
        "adaln_groups": 2,
        "mixer_options": {"d_state": 8, "headdim": 8},
    },
}


WEIGHTS = Path(__file__).parent / "weights"


def _cfg(name: str) -> dict[str, Any]:
    if name == "vq_nano":
        sizes = SIZES[name]
        return {
            "input_size": (sizes["in_channels"], sizes["sample_size"], sizes["sample_size"]),
            "first_conv": "encoder.conv_in",
            "license": "apache-2.0",
            "paper_name": "Neural Discrete Representation Learning",
            "paper_ids": "arXiv:1711.00937",
        }
    if "aim" in name:
        sizes = {"num_tokens": 256, **SIZES[name]}
        return {
            "num_classes": sizes.get("num_classes", 1000),
            "input_size": (sizes["num_tokens"],),
            "first_conv": "embeddings.word_embeddings",
            "classifier": "lm_head",
            "license": "apache-2.0" if name.startswith(("test", "aim_nano")) else "mit",
            "paper_name": "Scalable Autoregressive Image Generation with Mamba",
            "paper_ids": "arXiv:2408.12245",
            "origin_url": "https://github.com/hp-l33/AiM",
        }
    sizes = {"sample_size": 32, "in_channels": 4, "num_classes": 1000, **SIZES[name]}
    return {
        "num_classes": sizes["num_classes"],
        "input_size": (sizes["in_channels"], sizes["sample_size"], sizes["sample_size"]),
        "first_conv": "patch_embed.proj",
        "classifier": "final_linear",
        "license": "apache-2.0",
        "paper_name": "LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba",
        "paper_ids": "arXiv:2408.02615",
        "origin_url": "https://github.com/yunxiangfu2001/LaMamba-Diff",
    }


default_cfgs = generate_default_cfgs(
    {tag: cfg for name in SIZES for tag, cfg in shipped_cfgs(WEIGHTS, name, _cfg(name)).items()}
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' weights, or our own, as `model` has them.

    Raises:
        ValueError: if the weights are of another model.
    """
    if not hasattr(model, "fit_weights"):  # diffusers' VQModel
        from sinuous.vision.generation.tokenizers import of_tokenizer

        state = of_tokenizer(state_dict)
        check_weights(state, model)
        return state
    fit: Callable[[Mapping[str, Any]], dict[str, Tensor]] = cast("Any", model).fit_weights
    return fit(state_dict)


def _lamamba_diff(variant: str, **kwargs: Any) -> LaMambaDiff:
    package("diffusers", "diffusion")
    from sinuous.vision.generation.lamamba_diff import LaMambaDiff

    model: LaMambaDiff = LaMambaDiff(**{**SIZES[variant], **kwargs})
    return model


def _aim(variant: str, **kwargs: Any) -> AiM:
    package("diffusers", "diffusion")
    from sinuous.vision.generation.aim import AiM

    model: AiM = AiM(**{**SIZES[variant], **kwargs})
    return model


def _vq(variant: str, **kwargs: Any) -> nn.Module:
    package("diffusers", "diffusion")
    from diffusers import VQModel

    model: nn.Module = VQModel(**{**SIZES[variant], **kwargs})
    return model


@register_model(domain="generation")
def lamamba_diff_s(pretrained: bool = False, **kwargs: Any) -> LaMambaDiff:
    """LaMamba-Diff-S, of inferred width, for 32 x 32 latents of pictures of 256 pixels."""
    return _lamamba_diff("lamamba_diff_s", **kwargs)


@register_model(domain="generation")
def lamamba_diff_b(pretrained: bool = False, **kwargs: Any) -> LaMambaDiff:
    """LaMamba-Diff-B, of inferred width."""
    return _lamamba_diff("lamamba_diff_b", **kwargs)


@register_model(domain="generation")
def lamamba_diff_l(pretrained: bool = False, **kwargs: Any) -> LaMambaDiff:
    """LaMamba-Diff-L, of inferred width."""
    return _lamamba_diff("lamamba_diff_l", **kwargs)


@register_model(domain="generation")
def lamamba_diff_xl(pretrained: bool = False, **kwargs: Any) -> LaMambaDiff:
    """LaMamba-Diff-XL; the released configuration has d_state=1, the paper's GFLOPs are those of 16."""
    return _lamamba_diff("lamamba_diff_xl", **kwargs)


@register_model(domain="generation")
def lamamba_diff_nano(pretrained: bool = False, **kwargs: Any) -> LaMambaDiff:
    """For gray pictures of 32 pixels, small enough to train on a laptop's CPU; ours, not the paper's."""
    return _lamamba_diff("lamamba_diff_nano", **kwargs)


@register_model(domain="generation")
def test_lamamba_diff(pretrained: bool = False, **kwargs: Any) -> LaMambaDiff:  # noqa: PT028
    """For tests: every mechanism at the smallest size."""
    return _lamamba_diff("test_lamamba_diff", **kwargs)


@register_model(domain="generation")
def aim_b(pretrained: bool = False, **kwargs: Any) -> AiM:
    """AiM-B: FID 3.52 on ImageNet at 256 pixels in the paper."""
    return _aim("aim_b", **kwargs)


@register_model(domain="generation")
def aim_l(pretrained: bool = False, **kwargs: Any) -> AiM:
    """AiM-L: FID 2.83 in the paper."""
    return _aim("aim_l", **kwargs)


@register_model(domain="generation")
def aim_xl(pretrained: bool = False, **kwargs: Any) -> AiM:
    """AiM-XL: FID 2.56 in the paper."""
    return _aim("aim_xl", **kwargs)


@register_model(domain="generation")
def aim_nano(pretrained: bool = False, **kwargs: Any) -> AiM:
    """For 7 x 7 codes of gray pictures of 28 pixels; ours, not the paper's."""
    return _aim("aim_nano", **kwargs)


@register_model(domain="generation")
def vq_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """diffusers' VQModel of gray pictures of 28 pixels as 7 x 7 codes, for `aim_nano`."""
    return _vq("vq_nano", **kwargs)


@register_model(domain="generation")
def test_aim(pretrained: bool = False, **kwargs: Any) -> AiM:  # noqa: PT028
    """For tests: every mechanism at the smallest size."""
    return _aim("test_aim", **kwargs)
