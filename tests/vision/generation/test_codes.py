"""Tokenizing pictures, drawing their codes, and pipelines in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sinuous
from sinuous.core.weights import Weights
from sinuous.vision.datasets import InMemoryImages

diffusers = pytest.importorskip("diffusers")

from sinuous.vision.generation import (  # noqa: E402  # noqa: E402
    AiMPipeline,
    ClassConditionalPipeline,
    load_pipeline,
    load_vq_tokenizer,
    models,
    pipelines,
)
from sinuous.vision.generation.code_tasks import CodeModelling, Tokenizing  # noqa: E402
from sinuous.vision.generation.datasets import PictureCodes  # noqa: E402
from sinuous.vision.generation.shipped import main, shipped_pipeline, write_pipeline  # noqa: E402

CLASSES = ["Bag", "Sneaker"]


def tokenizer() -> Any:
    torch.manual_seed(0)
    levels: dict[str, Any] = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return sinuous.create_model("vq_nano", num_vq_embeddings=16, **levels, **blocks).eval()


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def step(task: Tokenizing, model: Any, batch: Tensor, optimizer: Any) -> float:
    optimizer.zero_grad()
    loss = task.loss(model, (batch, None))
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_a_tokenizer_learns_and_its_codebook_does_not_collapse(tmp_path: Path) -> None:
    model, task = tokenizer().train(), Tokenizing(patience=3)
    task.prepare(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = [step(task, model, pictures(16, seed), optimizer) for seed in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    with torch.no_grad():
        seen = task.score(model.eval(), (pictures(40), None))
    assert len(seen[0].unique()) >= 14  # of 16
    errors = {name: float(metric.compute()) for name, metric in task.scores.items()}
    lines = task.report(model, None, [seen], errors, tmp_path, "test")
    assert f"{len(seen[0].unique())} of 16 codes in use" in lines[1]
    assert (tmp_path / "samples_test.png").is_file()
    again = load_vq_tokenizer(tmp_path / "tokenizer")
    assert torch.equal(again.encode(pictures(2)).latents, model.encode(pictures(2)).latents)


def test_a_code_begins_anew_when_it_has_been_idle_for_long_and_not_before() -> None:
    model, task = tokenizer(), Tokenizing(patience=3)
    task.prepare(model)
    codebook = model.quantize.embedding.weight
    with torch.no_grad():
        task.loss(model, (pictures(8), None))  # all of them begin at what the encoder makes
        vectors = model.encode(pictures(8)).latents.permute(0, 2, 3, 1).flatten(0, 2)
        assert (codebook[:, None] - vectors).norm(dim=-1).min(1).values.max() < 1e-6
        codebook[5] = 100.0
        for _ in range(3):
            task.loss(model, (pictures(8), None))
            assert (codebook[5] == 100.0).all()
        task.loss(model, (pictures(8), None))
        assert (codebook[5] != 100.0).all()


def test_the_loss_of_a_tokenizer_is_its_equation() -> None:
    model, task = tokenizer(), Tokenizing(commitment=0.5, patience=100)
    task.prepare(model)
    task.idle.zero_()
    x = pictures(4)
    z = model.encode(x).latents
    q = model.quantize.embedding.weight[model.quantize(z)[2][2]].view(4, 3, 3, -1).permute(0, 3, 1, 2)
    made = model.decode(q, force_not_quantize=True).sample
    expected = (made - x).abs().mean() + (made - x).square().mean() + 0.5 * 1.25 * (z - q).square().mean()
    torch.testing.assert_close(task.loss(model, (x, None)), expected)


def coded(path: Path, **options: Any) -> PictureCodes:
    def dataset(split: str, transform: Any) -> InMemoryImages:
        images = np.random.default_rng(0).integers(0, 256, (5, 6, 6), dtype=np.uint8)
        return InMemoryImages(images, np.array([0, 1, 0, 1, 0]), CLASSES, transform)

    def as_tensor(image: Any) -> Tensor:
        return torch.from_numpy(np.array(image))[None].float() / 127.5 - 1

    sizes: dict[str, Any] = {"num_classes": 2, "in_chans": 1, "img_size": 6, "mean": [0.5], "std": [0.5]}
    return PictureCodes(
        dataset=dataset,
        eval_transform=as_tensor,
        tokenizer=path,
        **{"vocab_size": 16, "num_tokens": 9, **sizes, **options},
    )


def test_pictures_are_read_as_codes_a_training_one_mirrored_at_random(tmp_path: Path) -> None:
    vq = tokenizer()
    vq.save_pretrained(tmp_path)
    data = coded(tmp_path)
    image = torch.stack([picture for picture, _ in data.read("val", data.eval_transform)])
    expected = [vq.quantize(vq.encode(x).latents)[2][2].view(5, 9) for x in (image, image.flip(-1))]
    for index, (before, codes, conditions) in enumerate(data.split("val")):
        assert torch.equal(codes, expected[0][index])
        assert torch.equal(before, codes[:-1])
        assert conditions["class_labels"] == index % 2
    drawn = {tuple(data.split("train")[0][1].tolist()) for _ in range(20)}
    assert drawn == {tuple(codes[0].tolist()) for codes in expected}
    data.augment = False
    assert {tuple(data.split("train")[0][1].tolist()) for _ in range(20)} == {tuple(expected[0][0].tolist())}
    with pytest.raises(ValueError, match=r"16 codes and the model predicts 8; give data.vocab_size=16"):
        coded(tmp_path, vocab_size=8).split("val")
    with pytest.raises(ValueError, match=r"9 codes and the model predicts 4; give data.num_tokens=9"):
        coded(tmp_path, num_tokens=4).split("val")
    with pytest.raises(FileNotFoundError, match="there is no tokenizer nowhere; train one"):
        coded(Path("nowhere")).split("val")


def aim() -> Any:
    torch.manual_seed(0)
    model: Any = sinuous.create_model("test_aim", num_classes=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_a_run_of_codes_drops_labels_and_leaves_a_pipeline_with_its_defaults(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "vq")
    data, model = coded(tmp_path / "vq"), aim()
    before, codes, conditions = torch.utils.data.default_collate(list(data.split("val")))
    nobody, everybody = CodeModelling("code", 1.0), CodeModelling("code", 0.0, columns=3, guidance_scale=2.0, top_k=8)
    told = model(before, conditions["class_labels"])
    untold = model(before, 2)
    for task, logits in ((nobody, untold), (everybody, told)):
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
        torch.testing.assert_close(task.loss(model, (before, codes, conditions)), expected)
    seen = [everybody.score(model, (before, codes, conditions))]
    assert seen == [45]
    lines = everybody.report(model, data, seen, {"bits_per_code": 4.0}, tmp_path, "test")
    assert "6 pictures of 2 classes in" in lines[-1]
    pipeline: Any = load_pipeline(tmp_path / "pipeline")
    assert pipeline.labels == {"Bag": 0, "Sneaker": 1}
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "codes"}
    by_default = pipeline("sneaker", **options).images
    options["generator"] = torch.Generator().manual_seed(0)
    assert torch.equal(by_default, pipeline(1, 2.0, temperature=1.0, top_k=8, **options).images)
    streamed = torch.stack(list(pipeline.stream(1, generator=torch.Generator().manual_seed(0))), 1)
    assert torch.equal(streamed.view(1, 3, 3), by_default)


def shipped(path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch, **model_args: Any) -> Weights:
    card = {"model_args": model_args}
    weights = Weights(f"{architecture}.test", architecture, "test", path, card)
    monkeypatch.setattr(pipelines, "all_weights", lambda: {weights.name: weights})
    real = sinuous.create_model
    monkeypatch.setattr(
        "sinuous.vision.generation.shipped.create_model",
        lambda name, pretrained: real(architecture, checkpoint_path=path, **model_args),
    )
    return weights


def test_a_pipeline_of_codes_fits_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = AiMPipeline(aim(), tokenizer(), id2label=dict(enumerate(CLASSES)), defaults={"guidance_scale": 3.0})
    path = tmp_path / "test_aim.test.safetensors"
    write_pipeline(made, path, {"classes": CLASSES}, torch.float32)
    shipped(path, "test_aim", monkeypatch, num_classes=2)
    read: Any = load_pipeline("test_aim")
    assert read.labels == made.labels
    for one, other in ((made.transformer, read.transformer), (made.vqvae, read.vqvae)):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    pictures = [p("bag", generator=torch.Generator().manual_seed(0), output_type="pt").images for p in (made, read)]
    assert torch.equal(*pictures)
    write_pipeline(made, path)
    assert torch.equal(load_vq_tokenizer(path).quantize.embedding.weight, made.vqvae.quantize.embedding.weight.half())


def test_a_denoiser_with_its_scheduler_fits_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = sinuous.create_model("test_lamamba_diff", in_channels=1, out_channels=1, zero_init_output=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    made = ClassConditionalPipeline(model, scheduler, id2label={0: "Bag"}, defaults={"num_inference_steps": 2})
    path = tmp_path / "test_lamamba_diff.test.safetensors"
    write_pipeline(made, path, dtype=torch.float32)
    weights = shipped(path, "test_lamamba_diff", monkeypatch, in_channels=1, out_channels=1)
    read: Any = load_pipeline("test_lamamba_diff.test")
    assert read.scheduler.config.shift == 2.0
    pictures = [p("Bag", generator=torch.Generator().manual_seed(0), output_type="pt").images for p in (made, read)]
    assert torch.equal(*pictures)
    assert len(read.scheduler.timesteps) == 2
    with pytest.raises(ValueError, match=r"takes torch_dtype alone \(got variant\)"):
        load_pipeline("test_lamamba_diff.test", variant="fp16")
    assert load_pipeline("test_lamamba_diff.test", torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    sinuous.core.checkpoints.save_safetensors(model.state_dict(), path)
    with pytest.raises(ValueError, match="says nothing of a pipeline"):
        shipped_pipeline(weights)


def test_a_model_without_weights_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "all_weights", dict)
    for name in ("aim_nano", "aim_nano.fashion_mnist"):
        with pytest.raises(ValueError, match=f"the weights {name} do not come with this version of the package; give"):
            load_pipeline(name)
    with pytest.raises(ValueError, match="nowhere is not there"):
        load_pipeline("nowhere")


def test_files_that_ship_are_small_and_in_half_precision() -> None:
    for path in models.WEIGHTS.glob("*.safetensors"):
        assert path.stat().st_size <= 4e6
        assert "pipeline" in sinuous.core.checkpoints.read_metadata(path)
        assert json.loads(path.with_suffix(".json").read_text())["cpu_minutes"] <= 90


def test_a_folder_that_is_no_run_is_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no_run"), str(tmp_path / "a.b.safetensors")]) == 2
    assert capsys.readouterr().err.startswith(f"shipped: {tmp_path}/no_run/pipeline is not there; give")
    assert not list(tmp_path.iterdir())
