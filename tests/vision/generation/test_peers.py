"""DiT as a peer: the paper's sizes, one of a given size, and labels that it never drops by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sinuous

diffusers = pytest.importorskip("diffusers")

from sinuous.vision.generation import ClassConditionalPipeline, load_pipeline  # noqa: E402
from sinuous.vision.generation.peers import dit, dit_of  # noqa: E402


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("parameters", [60_000, 1_400_213, 30_000_000])
def test_a_dit_of_a_given_size_is_found(parameters: int) -> None:
    with torch.device("meta"):
        model = dit_of(parameters, in_channels=1, out_channels=1, num_classes=10)
    assert count(model) == pytest.approx(parameters, rel=0.05)
    assert model.config.out_channels == 1
    assert model.config.patch_size == 2


def test_a_size_that_no_dit_has_is_refused() -> None:
    with pytest.raises(ValueError, match="no DiT of heads of width 16 has about 10 parameters"):
        dit_of(10)
    with pytest.raises(ValueError, match="name must be one of"):
        dit("dit_m")


def test_labels_are_not_dropped_in_training() -> None:
    torch.manual_seed(0)
    model = dit_of(60_000, sample_size=8, in_channels=1, num_classes=10).train()
    embedders = [block.norm1.emb.class_embedder for block in model.transformer_blocks]
    labels = torch.arange(10).repeat(50)
    assert all(torch.equal(embedder(labels), embedder.embedding_table(labels)) for embedder in embedders)
    assert embedders[0].embedding_table.weight.shape[0] == 11


def test_a_peer_has_the_size_of_the_smallest_denoiser() -> None:
    ours = sinuous.create_model("lamamba_diff_nano")
    theirs = dit_of(count(ours), sample_size=32, in_channels=1, out_channels=1, num_classes=10)
    assert count(theirs) == pytest.approx(count(ours), rel=0.05)
    x = torch.zeros(2, 1, 32, 32)
    assert theirs(x, torch.tensor([1, 2]), torch.tensor([3, 10])).sample.shape == ours(x, 1).sample.shape


def test_it_starts_as_the_papers_does() -> None:
    model = dit_of(60_000, sample_size=8, in_channels=1, num_classes=10)
    x, step, label = torch.randn(2, 1, 8, 8), torch.tensor([1, 900]), torch.tensor([3, 10])
    assert model(x, step, label).sample.count_nonzero() == 0
    assert model(x).sample.shape == (2, 2, 8, 8)
    tokens = torch.randn(2, 16, model.inner_dim)
    assert torch.equal(model.transformer_blocks[0](tokens, timestep=step, class_labels=label), tokens)


def test_its_pipeline_is_saved_and_loaded(tmp_path: Path) -> None:
    model = dit_of(60_000, sample_size=8, in_channels=1, out_channels=1, num_classes=10)
    torch.nn.init.normal_(model.proj_out_2.weight)
    pipeline = ClassConditionalPipeline(model, diffusers.FlowMatchEulerDiscreteScheduler())
    pipeline.save_pretrained(tmp_path)
    options = {"num_inference_steps": 2, "output_type": "latent"}
    first, second = (
        made([3, None], generator=torch.Generator().manual_seed(0), **options).images
        for made in (pipeline, load_pipeline(tmp_path))
    )
    assert torch.equal(first, second)
