"""Denoising: losses against diffusers' own noise and velocities, samplers that end where a perfect model leads."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sinuous.core.tasks.denoising import Denoising, denoising_loss, draw_timesteps

diffusers = pytest.importorskip("diffusers")

PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Recorded(nn.Module):
    """Returns a constant times its input, and remembers what it was called with."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor, self.calls = factor, []

    def forward(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Any:
        self.calls.append((x, timestep, conditions))
        return SimpleNamespace(sample=self.factor * x)


class Knowing(nn.Module):
    """Predicts what it should of samples that it knows."""

    def __init__(self, samples: Tensor, scheduler: Any) -> None:
        super().__init__()
        self.samples, self.scheduler = samples, scheduler

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if not hasattr(self.scheduler, "alphas_cumprod"):
            sigma = (timestep.double() / 1000).clamp(min=1e-9).view(-1, 1, 1)
            return (x - self.samples) / sigma
        kept = self.scheduler.alphas_cumprod.double()[timestep.long()].view(-1, 1, 1)
        noise = (x - kept.sqrt() * self.samples) / (1 - kept).sqrt()
        v = kept.sqrt() * noise - (1 - kept).sqrt() * self.samples
        kind: str = self.scheduler.config.prediction_type
        return {"epsilon": noise, "sample": self.samples, "v_prediction": v}[kind]


def scheduler_for(prediction: str, **options: Any) -> Any:
    if prediction == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(**options)
    return diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=False, **options)


def samples(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_that_of_diffusers_noise_and_velocity(prediction: str) -> None:
    scheduler, x, model = scheduler_for(prediction), samples(), Recorded()
    noise, steps = torch.randn_like(x), torch.tensor([0, 500, 999])
    noisy = scheduler.add_noise(x, noise, steps)
    target = {"epsilon": noise, "sample": x, "v_prediction": scheduler.get_velocity(x, noise, steps)}[prediction]
    wanted = (0.5 * noisy - target).square().mean((1, 2))
    loss = denoising_loss(model, x, None, scheduler, noise=noise, timesteps=steps)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    ((given, timestep, conditions),) = model.calls
    torch.testing.assert_close(given, noisy, rtol=0, atol=1e-6)
    assert torch.equal(timestep, steps)
    assert conditions == {}


def test_a_flow_runs_from_samples_to_noise() -> None:
    x, model, scheduler = samples(), Recorded(), scheduler_for("flow")
    noise, steps = torch.randn_like(x), torch.tensor([0.0, 250.0, 1000.0])
    loss = denoising_loss(model, x, None, scheduler, noise=noise, timesteps=steps)
    sigma = (steps / 1000).view(3, 1, 1)
    noisy = x + sigma * (noise - x)
    torch.testing.assert_close(loss, (0.5 * noisy - (noise - x)).square().mean((1, 2)))
    assert torch.equal(model.calls[0][1], steps)


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "flow"])
def test_a_perfect_model_loses_nothing_and_leads_the_sampler_to_the_samples(prediction: str) -> None:
    x, scheduler = samples(), scheduler_for(prediction)
    model = Knowing(x, scheduler)
    loss = denoising_loss(model, x, None, scheduler, generator=torch.Generator().manual_seed(0))
    assert float(loss.max()) < 1e-6
    sampler = scheduler if prediction == "flow" else diffusers.DDIMScheduler.from_config(scheduler.config)
    sampler.set_timesteps(10)
    current = torch.randn_like(x)
    for step in sampler.timesteps:
        current = sampler.step(model(current, step.expand(3)), step, current).prev_sample
    torch.testing.assert_close(current, x, rtol=0, atol=0.05)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_are_those_of_diffusers_and_finite_without_signal(prediction: str) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    scheduler, x = scheduler_for(prediction, rescale_betas_zero_snr=True), samples(4)
    steps = torch.tensor([0, 300, 700, 999])
    options = {"noise": torch.randn_like(x), "timesteps": steps}
    plain = denoising_loss(Recorded(), x, None, scheduler, **options)
    weighed = denoising_loss(Recorded(), x, None, scheduler, min_snr_gamma=5.0, **options)
    snr = training_utils.compute_snr(scheduler, steps)
    least = snr.clamp(max=5.0)
    wanted = {"epsilon": least / snr, "sample": least, "v_prediction": least / (snr + 1)}[prediction]
    torch.testing.assert_close((weighed / plain)[:3], wanted[:3].double(), rtol=1e-4, atol=1e-7)
    assert bool(weighed.isfinite().all())


def test_a_generator_decides_and_conditions_reach_the_model() -> None:
    x, scheduler, model = samples(), scheduler_for("epsilon"), Recorded()
    labels, mel = torch.tensor([0, 1, 2]), torch.randn(3, 4, 5)
    losses = [
        denoising_loss(model, x, labels, scheduler, generator=torch.Generator().manual_seed(seed), mel=mel)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    assert model.calls[0][2] == {"class_labels": labels, "mel": mel}


def test_steps_are_uniform_or_of_a_flow_logistic_normal_and_shifted() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = draw_timesteps(scheduler_for("epsilon"), 20000, generator)
    assert uniform.dtype == torch.int64
    assert uniform.min() == 0
    assert uniform.max() == 999
    assert 490 < float(uniform.double().mean()) < 510
    flow = draw_timesteps(scheduler_for("flow"), 20000, generator) / 1000
    logits = torch.logit(flow.double())
    assert abs(float(logits.mean())) < 0.03
    assert abs(float(logits.std()) - 1) < 0.03
    shifted = draw_timesteps(scheduler_for("flow", shift=3.0), 5, torch.Generator().manual_seed(1)) / 1000
    plain = draw_timesteps(scheduler_for("flow"), 5, torch.Generator().manual_seed(1)) / 1000
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


def test_a_class_is_dropped_once_for_a_sample_and_in_training_alone() -> None:
    x, labels, model = samples(400), torch.randint(7, (400,)), Recorded()
    task = Denoising(scheduler_for("epsilon"), num_classes=7, class_dropout=0.25)
    task.loss(model, (x, labels))
    told = model.calls[-1][2]["class_labels"]
    assert bool(((told == labels) | (told == 7)).all())
    assert 0.18 < float((told == 7).double().mean()) < 0.32
    task.score(model, (x, labels))
    assert torch.equal(model.calls[-1][2]["class_labels"], labels)
    Denoising(scheduler_for("epsilon"), class_dropout=0.5).loss(model, (x, labels, {"mel": x}))
    assert list(model.calls[-1][2]) == ["mel"]


def test_the_score_of_a_batch_is_the_same_each_time() -> None:
    x, values = samples(4), []
    for draws in (1, 1, 8):
        task, model = Denoising(scheduler_for("flow"), draws=draws), Recorded()
        assert task.score(model, (x, torch.zeros(4))) == 4
        values.append(float(task.scores["loss"].compute()))  # type: ignore[union-attr]
        assert len({float(call[1][0]) for call in model.calls}) == draws
    assert values[0] == values[1] != values[2]


def test_gradients_reach_the_model() -> None:
    model = nn.Conv1d(1, 1, 3, padding=1)

    class Denoiser(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            out: Tensor = model(x)
            return out

    Denoising(scheduler_for("epsilon"), min_snr_gamma=5.0).loss(Denoiser(), (samples().float(), None)).backward()
    assert model.weight.grad is not None
    assert bool(model.weight.grad.abs().max() > 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": torch.zeros(3, 1, 19)}, r"noise must have the samples' shape \[3, 1, 20\]"),
        ({"timesteps": torch.tensor([1])}, "one for each of the 3 samples"),
        ({"timesteps": torch.tensor([0, 5, 1000])}, r"between 0 and 999, .*got 0 to 1000"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be more than 0"),
        ({"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "min_snr_gamma": 5.0}, "not of a flow"),
        ({"scheduler": SimpleNamespace(config={"prediction_type": "x"}, alphas_cumprod=0)}, "prediction_type must be"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"scheduler": scheduler_for("epsilon"), **options}
    with pytest.raises(ValueError, match=message):
        denoising_loss(Recorded(), samples(), None, **arguments)


class Times(nn.Module):
    """Returns its input so many times, one behind the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.cat([x] * self.count, 1)


def test_a_model_of_other_channels_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"as many channels .*\[3, 1, 20\].* \(got \[3, 3, 20\]\); build it with out_ch"
    ):
        denoising_loss(Times(3), samples(), None, scheduler_for("epsilon"))
    with pytest.raises(ValueError, match=r"as many channels .*\[3, 1, 20\] \(got \[3, 2, 20\]\); build it with out_ch"):
        denoising_loss(Times(2), samples(), None, scheduler_for("flow"))
    with pytest.raises(ValueError, match="variance_type must be 'learned_range'"):
        denoising_loss(Times(2), samples(), None, scheduler_for("epsilon", variance_type="learned"))


@pytest.mark.parametrize("options", [{"class_dropout": 1.5}, {"min_snr_gamma": -1.0}, {"draws": 0}, {"num_classes": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"task.{next(iter(options))} must"):
        Denoising(scheduler_for("epsilon"), **options)


def test_the_task_itself_needs_no_diffusers() -> None:
    code = "import sys; import sinuous.core.tasks.denoising; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
