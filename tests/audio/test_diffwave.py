"""DiffWave: the published sizes, any length and hop, steps and spectrograms that reach all rates, saving, loading."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sinuous
from sinuous.apps.models import main as list_of_models

pytest.importorskip("diffusers")

from sinuous.audio.diffusion_models import SIZES, checkpoint_filter_fn
from sinuous.audio.diffwave import DiffWaveSashimi, DiffWaveWaveNet
from sinuous.audio.diffwave_layers import MelUpsampling, WeightNormConv1d, embed_steps, two_factors
from sinuous.core.mixers import S4, list_mixers

WAVENET = {"embed_dim": 8, "skip_channels": 12, "depth": 3, "dilation_cycle": 2}
COUNTS = {
    "diffwave_sashimi": 23_470_971,
    "diffwave_sashimi_small": 7_734_267,
    "diffwave_sashimi_vocoder": 3_153_459,
    "diffwave_wavenet": 24_071_681,
    "diffwave_wavenet_small": 6_827_393,
}


def create(body: str = "sashimi", **options: Any) -> Any:
    torch.manual_seed(0)
    if body == "sashimi":
        model: Any = sinuous.create_model("test_diffwave", **options)
    else:
        model = DiffWaveWaveNet(**{**WAVENET, **options})
    model = torch.nn.Module.to(model, torch.float64).eval()
    torch.nn.init.normal_(model.final_conv[2].conv.weight)
    for name, parameter in model.named_parameters():
        if "kernel" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def wave(length: int, count: int = 2) -> Tensor:
    return torch.randn(count, 1, length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_are_the_authors(name: str) -> None:
    info = sinuous.model_info(name)
    assert info.params == COUNTS[name]
    assert info.domain == "audio"
    if name.endswith("vocoder"):
        with torch.device("meta"):
            plain = sinuous.create_model(name, mel_bands=None)
        assert sum(p.numel() for p in plain.parameters()) == 2_990_139


@pytest.mark.parametrize("body", ["sashimi", "wavenet"])
@pytest.mark.parametrize("length", [1, 3, 16, 37])
def test_as_many_samples_come_out_as_go_in(body: str, length: int) -> None:
    model = create(body)
    output = model(wave(length), torch.tensor([3, 150])).sample
    assert output.shape == (2, 1, length)
    assert bool(output.isfinite().all())
    assert torch.equal(model(wave(length), torch.tensor([3, 150]), return_dict=False)[0], output)


@pytest.mark.parametrize("hop", [1, 2, 7, 12, 16])
@pytest.mark.parametrize("body", ["sashimi", "wavenet"])
def test_a_spectrogram_of_any_hop_is_heard(body: str, hop: int) -> None:
    length = 8 * hop + 3
    model = create(body, mel_bands=5, hop=hop)
    mel = torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        output = model(wave(length), 7, mel).sample
        assert output.shape == (2, 1, length)
        assert not torch.allclose(output, model(wave(length), 7).sample)


@pytest.mark.parametrize("hop", [1, 3, 4, 5, 16])
def test_frames_become_samples_in_their_place(hop: int) -> None:
    layer = MelUpsampling(hop)
    with torch.no_grad():
        layer.weight_v.fill_(1)
        layer.weight_g.fill_(math.sqrt(layer.weight_v.numel()))
        layer.bias.zero_()
    mel = torch.zeros(1, 1, 1, 9)
    mel[..., 4] = 1
    heard = layer(mel)[0, 0, 0]
    assert heard.shape == (9 * hop,)
    places = heard.nonzero().flatten().double()
    assert abs(float(places.mean()) - (4.5 * hop - 0.5)) <= 0.5


def test_streams_of_lower_rates_are_told_the_spectrogram_at_their_rate() -> None:
    model = create(mel_bands=3, hop=8, depth=1)
    rates = {name: block.rate for name, block in model.named_modules() if hasattr(block, "of_mel")}
    assert rates == {
        "d_layers.0": 1, "d_layers.2": 2, "c_layers.0": 4, "u_layers.1": 2, "u_layers.3": 1,
    }  # fmt: skip
    block, mel = model.c_layers[0], torch.randn(1, 3, 6, dtype=torch.float64)
    whole = block.of_mel(mel, 12)
    assert whole.shape == (1, 32, 12)
    late = mel.clone()
    late[..., 5] += 1
    changed = (block.of_mel(late, 12) - whole).abs().amax((0, 1)) > 1e-9
    assert changed[-2:].all()
    assert not changed[:8].any()
    block.first_samples = True  # the authors' code: the first quarter alone
    torch.testing.assert_close(block.of_mel(late, 12), block.of_mel(mel, 12))


def test_steps_are_embedded_as_the_paper_has_it() -> None:
    first, second = torch.nn.Linear(128, 128).double(), torch.nn.Linear(128, 128).double()
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.copy_(torch.eye(128))
            layer.bias.zero_()
    got = embed_steps(torch.tensor([0, 50]), first, second)[1]
    angles = torch.tensor([50 * 10 ** (-4 * j / 63) for j in range(64)], dtype=torch.float64)
    silu = torch.nn.functional.silu
    torch.testing.assert_close(got, silu(silu(torch.cat([angles.sin(), angles.cos()]))))


@pytest.mark.parametrize("body", ["sashimi", "wavenet"])
def test_rows_and_their_steps_are_apart(body: str) -> None:
    model, steps = create(body), torch.tensor([3, 150])
    together = model(wave(40), steps).sample
    for i in range(2):
        torch.testing.assert_close(model(wave(40)[i : i + 1], int(steps[i])).sample, together[i : i + 1])
    assert not torch.allclose(model(wave(40), 3).sample[1], together[1])


def test_every_sample_is_heard_on_both_sides() -> None:
    model = create()
    x = wave(24, 1).requires_grad_()
    (grad,) = torch.autograd.grad(model(x, 5).sample[0, 0, 11], x)
    assert bool((grad.abs() > 0).all())


@pytest.mark.parametrize("mixer", ["s4d_bidirectional", "gla", "mamba2"])
def test_another_mixer_is_one_option(mixer: str) -> None:
    assert mixer in list_mixers()
    model = sinuous.create_model("test_diffwave", embed_dim=16, mixer=mixer)
    assert model(torch.randn(1, 1, 20), 3).sample.shape == (1, 1, 20)


def test_a_new_model_predicts_nothing_and_learns() -> None:
    model: Any = sinuous.create_model("test_diffwave")
    assert not model(torch.randn(1, 1, 20), 3).sample.any()
    model(torch.randn(1, 1, 20), 3).sample.sum().backward()
    assert model.final_conv[2].conv.weight.grad.abs().max() > 0
    named = dict(model.named_parameters())
    undecayed = model.no_weight_decay()
    assert undecayed <= set(named)
    assert {"norm.m", "c_layers.0.layer.layer.kernel.A_real"} <= undecayed


@pytest.mark.parametrize("body", ["sashimi", "wavenet"])
def test_checkpointed_blocks_give_the_same_gradients(body: str) -> None:
    model, grads = create(body, mel_bands=3, hop=4), []
    mel = torch.randn(2, 3, 8, dtype=torch.float64)
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(wave(30), 5, mel).sample.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("body", ["sashimi", "wavenet"])
def test_save_pretrained_and_from_pretrained_are_equal_in_every_bit(body: str, tmp_path: Path) -> None:
    model = create(body, mel_bands=3, hop=4).float()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert dict(again.config)["mel_bands"] == 3
    mel = torch.randn(2, 3, 8)
    assert torch.equal(model(wave(30).float(), 5, mel).sample, again(wave(30).float(), 5, mel).sample)


def test_our_own_save_and_load(tmp_path: Path) -> None:
    model: Any = sinuous.create_model("test_diffwave", depth=2, mixer_options={"d_state": 4})
    sinuous.save(model, tmp_path / "saved")
    again: Any = sinuous.load(tmp_path / "saved")
    assert isinstance(again, DiffWaveSashimi)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def old_names(model: Any, steps: int) -> dict[str, Tensor]:
    """A state dict as the authors' third version of S4 has it, C as of a convolution of so many steps."""
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, S4)}
    old = {}
    for name, tensor in model.state_dict().items():
        prefix = next((prefix for prefix in mixers if name.startswith(f"{prefix}.layer.")), None)
        parameter = name.rpartition(".")[2]
        if prefix is None:
            old[name] = tensor.unsqueeze(-1) if ".output_linear.0.weight" in name else tensor
        elif parameter == "D":
            old[f"{prefix}.D"] = tensor
        else:
            names = {"inv_dt": "log_dt", "A_real": "inv_w_real", "A_imag": "w_imag"}
            changed = {"inv_dt": tensor.flatten(), "A_imag": -tensor}.get(parameter, tensor)
            old[f"{prefix}.kernel.kernel.{names.get(parameter, parameter)}"] = changed
    for prefix, mixer in mixers.items():
        old[f"{prefix}.kernel.kernel.L"] = torch.tensor(steps)
        dt, A, B, C, P = mixer.layer.kernel()
        full = [torch.view_as_complex(part.contiguous()) for part in (A, B, C, P[0])]
        A, _, C, P = (torch.cat([part, part.conj()], -1) for part in full)
        matrix = torch.diag_embed(A) - P.unsqueeze(-1) * P.conj().unsqueeze(-2)
        half = dt.view(-1, 1, 1) / 2 * matrix
        eye = torch.eye(A.shape[-1], dtype=A.dtype)
        power = torch.linalg.matrix_power(torch.linalg.solve(eye - half, eye + half), steps)
        truncated = C - torch.einsum("chn,hnm->chm", C, power)
        old[f"{prefix}.kernel.kernel.C"] = torch.view_as_real(truncated[..., : A.shape[-1] // 2])
    return old


def test_the_authors_checkpoints_are_read(tmp_path: Path) -> None:
    model = create(depth=2)
    old = old_names(model, 40)
    assert "c_layers.0.layer.kernel.kernel.log_dt" in old
    torch.save({"iter": 7, "model_state_dict": old}, tmp_path / "7.pkl")
    again = sinuous.create_model(
        "test_diffwave", checkpoint_path=tmp_path / "7.pkl", depth=2, dtype=torch.float64
    ).eval()
    torch.testing.assert_close(again(wave(40), 5).sample, model(wave(40), 5).sample, rtol=1e-9, atol=1e-9)
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in checkpoint_filter_fn(ours, model).items())


def test_weight_norm_is_torchs() -> None:
    conv = WeightNormConv1d(3, 4, 3, 2)
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(3, 4, 3, dilation=2, padding=2))
    reference.load_state_dict({
        "bias": conv.bias.detach(),
        "parametrizations.weight.original0": conv.weight_g.detach() * 2,
        "parametrizations.weight.original1": conv.weight_v.detach(),
    })  # fmt: skip
    conv.weight_g.data *= 2
    x = torch.randn(2, 3, 20)
    torch.testing.assert_close(conv(x), reference(x))


@pytest.mark.parametrize(
    ("hop", "factors"), [(256, (16, 16)), (100, (10, 10)), (97, (1, 97)), (120, (10, 12)), (1, (1, 1))]
)
def test_a_hop_is_made_in_two_strides(hop: int, factors: tuple[int, int]) -> None:
    assert two_factors(hop) == factors


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(1, 20), 0), {}, r"sample must be \[B, 1, T\]"),
        ((torch.zeros(1, 1, 0), 0), {}, "at least one step"),
        ((torch.zeros(3, 1, 20), torch.tensor([1, 2])), {}, "one for each of the 3 waves"),
        ((torch.zeros(1, 1, 20), 0, torch.zeros(1, 5, 9)), {}, "built without mel_bands"),
        ((torch.zeros(1, 1, 20), 0, torch.zeros(1, 5, 4)), {"mel_bands": 5, "hop": 5}, None),
        ((torch.zeros(1, 1, 21), 0, torch.zeros(1, 5, 4)), {"mel_bands": 5, "hop": 5}, "M at least 5, a frame for"),
        ((torch.zeros(2, 1, 20), 0, torch.zeros(1, 5, 4)), {"mel_bands": 5, "hop": 5}, r"mel must be \[2, 5, M\]"),
    ],
)
def test_wrong_calls_are_refused(arguments: tuple[Any, ...], options: dict[str, int], message: str | None) -> None:
    model = sinuous.create_model("test_diffwave", **options)
    if message is None:
        model(*arguments)
        return
    with pytest.raises(ValueError, match=message):
        model(*arguments)


def test_listing_models_imports_no_diffusers() -> None:
    code = (
        "import sys, sinuous; import sinuous.audio; names = sinuous.list_models('*diffwave*'); "
        f"sys.exit('diffusers' in sys.modules or len(names) != {len(SIZES)})"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_diffusers_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert list_of_models(["test_[dw]*"]) == 0
    printed = capsys.readouterr()
    assert "test_wave_classifier" in printed.out
    assert "left out: test_diffwave (this needs diffusers, which is not installed" in printed.err
    assert list_of_models(["*diffwave*"]) == 1
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sinuous\[diffusion\]'"):
        sinuous.create_model("test_diffwave")
