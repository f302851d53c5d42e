"""AiM: the paper's sizes, the authors' files, steps that equal the parallel form, and pictures from codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sinuous

diffusers = pytest.importorskip("diffusers")

from sinuous.vision.generation import AiM, AiMPipeline, load_pipeline, load_vq_tokenizer  # noqa: E402

GROUPS = [0, 2]


def build(**options: Any) -> Any:
    """Build the test model with no parameter at its start, so that a swapped or unused one shows."""
    torch.manual_seed(0)
    model: Any = sinuous.create_model("test_aim", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(("name", "total"), [("aim_b", 147_622_080), ("aim_l", 349_760_000), ("aim_xl", 763_291_392)])
def test_parameters_are_those_of_the_paper_to_the_unit(name: str, total: int) -> None:
    with torch.device("meta"):
        model = sinuous.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("adaln_groups", GROUPS)
@pytest.mark.parametrize("position_offset", [0, 1])
def test_steps_equal_the_parallel_form_with_a_state_that_does_not_grow(adaln_groups: int, position_offset: int) -> None:
    model = build(adaln_groups=adaln_groups, position_offset=position_offset).double()
    codes, labels = torch.randint(0, 16, (3, 9)), torch.tensor([3, 10, 0])
    expected = model(codes, labels)
    logits, state = model.start(labels)
    rows, sizes = [logits], set()
    for t in range(9):
        logits, state = model.step(codes[:, t], state)
        rows.append(logits)
        sizes.add(sum(t.numel() for t in torch.utils._pytree.tree_leaves(state)))
    torch.testing.assert_close(torch.stack(rows, 1), expected, atol=1e-12, rtol=1e-12)
    assert len(sizes) == 1
    with pytest.raises(ValueError, match="a picture has 9 codes"):
        model.step(codes[:, 0], state)


@pytest.mark.parametrize("adaln_groups", GROUPS)
def test_logits_are_the_equations(adaln_groups: int) -> None:
    model = build(adaln_groups=adaln_groups, position_offset=1).double()
    codes, labels = torch.randint(0, 16, (2, 5)), torch.tensor([3, 10])
    embeddings, condition = model.embeddings, model.cls_embed.embedding_table.weight[labels]
    places = embeddings.position_embeddings.weight[1:6]
    x = torch.cat([condition[:, None], embeddings.word_embeddings.weight[codes] + places], 1)

    def normed(x: Tensor, norm: nn.Module) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight

    for k, block in enumerate(model.layers):
        if adaln_groups:
            layer = model.adaln_group[1]
            shared = F.linear(F.silu(condition), layer.weight, layer.bias).view(2, 2, 3, 16)[:, k % 2]
            shift, scale, gate = (shared + block.scale_shift_table)[:, :, None].unbind(1)
        else:
            layer = block.adaLN_modulation[1]
            shift, scale, gate = F.linear(F.silu(condition), layer.weight, layer.bias)[:, None].chunk(3, -1)
        x = x + gate * block.mixer(normed(x, block.norm) * (1 + scale) + shift)
    final = model.final_layer
    layer = final.adaLN_modulation[1]
    shift, scale = F.linear(F.silu(condition), layer.weight, layer.bias)[:, None].chunk(2, -1)
    x = normed(normed(x, model.norm_f), final.norm_final) * (1 + scale) + shift
    expected = x @ embeddings.word_embeddings.weight.T
    torch.testing.assert_close(model(codes, labels), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("adaln_groups", GROUPS)
def test_the_authors_files_load(tmp_path: Path, adaln_groups: int) -> None:
    model = build(adaln_groups=adaln_groups)
    ours = model.state_dict()
    theirs = {f"mamba.backbone.{name}": tensor for name, tensor in ours.items()}
    theirs["mamba.lm_head.weight"] = ours["embeddings.word_embeddings.weight"].clone()
    theirs["vqvae.quantize.embedding.weight"] = torch.zeros(4, 2)
    torch.save(theirs, tmp_path / "model.pt")
    loaded: Any = sinuous.create_model("test_aim", checkpoint_path=tmp_path / "model.pt", adaln_groups=adaln_groups)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.state_dict().items())
    names = {n for n in ours if n.startswith("layers.0.") and ".mixer." not in n}
    table = ["scale_shift_table"] if adaln_groups else ["adaLN_modulation.1.weight", "adaLN_modulation.1.bias"]
    assert names == {f"layers.0.{name}" for name in ("norm.weight", *table)}
    theirs["mamba.lm_head.weight"] += 1
    with pytest.raises(ValueError, match="has a head of its own"):
        model.fit_weights(theirs)
    with pytest.raises(ValueError, match="not one of this AiM: it lacks"):
        build(adaln_groups=2 - adaln_groups).fit_weights(ours)


def test_wrong_calls_are_refused() -> None:
    model = build()
    for call, message in [
        (lambda: model(torch.zeros(1, 10, dtype=torch.long), 1), r"codes must have shape \[B, T\] with T up to 9"),
        (lambda: model(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3)), r"class_labels must have shape \[2\]"),
        (lambda: AiM(mixer="hydra"), "looks at the future"),
        (lambda: AiM(position_offset=2), "position_offset must lie between 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    torch.manual_seed(0)
    sides = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "num_vq_embeddings": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.VQModel(in_channels=1, out_channels=1, vq_embed_dim=4, **sides, **blocks).eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pictures_are_drawn_from_codes_each_as_alone(tokenizer: Any, tmp_path: Path) -> None:
    pipeline = AiMPipeline(build(), tokenizer)
    options: dict[str, Any] = {"guidance_scale": 2.0, "top_k": 8, "top_p": 0.95}
    codes = pipeline([1, None], generator=[seeded(0), seeded(1)], output_type="codes", **options).images
    assert codes.shape == (2, 3, 3)
    assert torch.equal(codes[1:], pipeline(None, generator=seeded(1), output_type="codes", **options).images)
    streamed = torch.stack(list(pipeline.stream([1, None], generator=[seeded(0), seeded(1)], **options)), 1)
    assert torch.equal(streamed, codes.flatten(1))
    images = pipeline([1, None], generator=[seeded(0), seeded(1)], output_type="pt", **options).images
    torch.testing.assert_close(images, (pipeline.decode(codes) / 2 + 0.5).clamp(0, 1))
    assert images.shape == (2, 1, 6, 6)
    assert pipeline(3, temperature=0.0).images[0].size == (6, 6)
    pipeline.save_pretrained(tmp_path)
    again: Any = load_pipeline(tmp_path)
    assert torch.equal(again([1], generator=seeded(0), output_type="codes", **options).images, codes[:1])


def test_guidance_is_from_none_to_the_class(tokenizer: Any) -> None:
    model = build()
    pipeline = AiMPipeline(model, tokenizer)
    own, none = model.start(torch.tensor([3, 10]))[0]
    for scale in (1.0, 0.0, 3.0):
        first = next(pipeline.stream(3, guidance_scale=scale, temperature=0.0))
        assert first.item() == (none + scale * (own - none)).argmax().item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"class_labels": 10}, "a class must be from 0 to 9"),
        ({"output_type": "latent"}, "output_type must be one of"),
        ({"generator": [seeded(0)] * 2}, r"one for each of the 1 pictures"),
    ],
)
def test_what_cannot_be_is_refused(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AiMPipeline(build(), tokenizer)(**{"class_labels": 1, **options})


def llamagen_names(name: str) -> str:
    """The name in LlamaGen's files of a parameter of diffusers' VQModel."""
    pairs = [
        (".mid_block.resnets.0.", ".mid.0."), (".mid_block.attentions.0.", ".mid.1."),
        (".mid_block.resnets.1.", ".mid.2."), ("coder.down_blocks.", "coder.conv_blocks."),
        ("coder.up_blocks.", "coder.conv_blocks."), (".resnets.", ".res."), (".attentions.", ".attn."),
        (".conv_shortcut.", ".nin_shortcut."), (".downsamplers.0.", ".downsample."), (".upsamplers.0.", ".upsample."),
        (".conv_norm_out.", ".norm_out."), (".group_norm.", ".norm."), (".to_out.0.", ".proj_out."),
        (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."),
    ]  # fmt: skip
    for theirs, ours in pairs:
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize("prefix", ["vqvae.", ""])
def test_a_tokenizer_of_llamagen_gives_the_codes_of_a_normalised_search(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    model = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=16, num_vq_embeddings=32, vq_embed_dim=8,
    )  # fmt: skip
    theirs = {}
    for name, tensor in model.state_dict().items():
        linear = any(part in name for part in (".to_q.w", ".to_k.w", ".to_v.w", ".to_out.0.w"))
        theirs[prefix + llamagen_names(name)] = tensor[:, :, None, None].clone() if linear else tensor.clone()
    theirs[f"{prefix}quantize.embedding.weight"] = torch.randn(32, 8)
    theirs[f"{prefix}quantize.codebook_used"] = torch.zeros(9)
    torch.save(theirs if prefix else {"model": theirs}, tmp_path / "vq.pt")
    tokenizer = load_vq_tokenizer(tmp_path / "vq.pt")
    x = torch.randn(1, 3, 16, 16)
    latents = tokenizer.encode(x).latents
    torch.testing.assert_close(latents, model.eval().encode(x).latents)
    codebook = F.normalize(theirs[f"{prefix}quantize.embedding.weight"], dim=-1)
    expected = (F.normalize(latents, dim=1).permute(0, 2, 3, 1).flatten(0, 2) @ codebook.T).argmax(-1)
    assert torch.equal(tokenizer.quantize(latents)[2][2], expected)


def test_files_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no VQ tokenizer"):
        load_vq_tokenizer(tmp_path / "other.pt")
