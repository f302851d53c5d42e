"""The reader of films: what order means to it, its parts of a film, its encoder, and memory in cells."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sinuous
from sinuous.core.checkpoints import save_safetensors
from sinuous.video.frame_reader import FrameReader


def reader(**options: Any) -> FrameReader:
    torch.manual_seed(0)
    return sinuous.create_model("test_frame_reader", **options)


def clips(frames: int = 9, batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, frames, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_film_read_in_parts_has_the_answers_of_its_beginnings() -> None:
    model, x = reader().double().eval(), clips().double()
    logits, state = model.prefill(x[:, :, :4])
    more, _ = model.prefill(x[:, :, 4:], state)
    answers = torch.cat([logits, more], 1)
    for stop in (1, 4, 9):
        torch.testing.assert_close(answers[:, stop - 1], model(x[:, :, :stop]), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("options", "sees_order"), [({}, True), ({"depth": 0, "global_pool": "avg"}, False)])
def test_only_blocks_see_the_order_of_frames(options: dict[str, Any], sees_order: bool) -> None:
    model, x = reader(**options).double().eval(), clips().double()
    same = torch.allclose(model(x), model(x.flip(2)), rtol=0, atol=1e-12)
    assert same is not sees_order


def test_frames_are_encoded_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = reader().double().eval(), clips().double()
    whole = model(x)
    seen: list[int] = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    monkeypatch.setattr("sinuous.video.frame_reader.GROUP", 4)
    torch.testing.assert_close(model(x), whole, rtol=0, atol=1e-12)
    assert max(seen) == 4


def test_a_frozen_encoder_stays_as_it_is() -> None:
    model = reader(frozen=True).train()
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(clips()).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    assert model.embed.weight.grad is not None
    trained = reader().train()
    trained(clips()).square().sum().backward()
    assert all(weight.grad is not None for weight in trained.encoder.parameters())


def test_cells_give_the_gradients_of_the_whole() -> None:
    plain, cells = reader().double().eval(), reader().double().eval()
    cells.set_grad_checkpointing(True, layers=1, steps=4)
    for model in (plain, cells):
        model(clips().double()).square().sum().backward()
    for one, other in zip(plain.parameters(), cells.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-11)


def test_weights_of_single_frames_give_the_encoder(tmp_path: Path) -> None:
    frames = reader(depth=0, num_classes=5)
    nn.init.constant_(frames.head.bias, 3.0)
    path = tmp_path / "frames.safetensors"
    save_safetensors(frames.state_dict(), path)
    for options in ({}, {"depth": 0, "global_pool": "avg"}):
        with pytest.warns(UserWarning, match="encoder and embedding alone are taken"):
            model = sinuous.create_model("test_frame_reader", checkpoint_path=path, **options)
        assert torch.equal(model.encoder.state_dict()["layers.0.conv.weight"], frames.encoder.layers[0].conv.weight)
        assert torch.equal(model.embed.weight, frames.embed.weight)
        assert model.head.out_features == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = sinuous.create_model("test_frame_reader", checkpoint_path=path, depth=0, num_classes=5)
    assert torch.equal(same.head.bias, frames.head.bias)
    with pytest.raises(ValueError, match="another FrameReader"):
        sinuous.create_model("frame_reader_nano", checkpoint_path=path)


def test_peers_are_overrides() -> None:
    window = {"mixer": "sliding_window_attention", "mixer_options": {"num_heads": 2, "window_size": 4}}
    model = reader(**window).double().eval()
    x = clips(frames=12).double()
    # Two blocks of windows of 4 look 6 frames back.
    assert torch.equal(model(x), model(torch.cat([x[:, :, :5] + 1, x[:, :, 5:]], 2)))
    with pytest.raises(NotImplementedError, match="no state to carry"):
        reader(depth=0).prefill(x.float())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 1, 16, 16), r"clips must be \[B, 1, N, H, W\]"),
        (torch.zeros(2, 3, 4, 16, 16), r"clips must be \[B, 1, N, H, W\]"),
        (torch.zeros(2, 1, 0, 16, 16), "at least one frame"),
    ],
)
def test_what_are_no_clips_is_told(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reader()(x)
