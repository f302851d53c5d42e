"""Distillation: the published invariances, who is trained by what, and a run from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sinuous.vision  # noqa: F401  (registers the models)
from sinuous.apps import cli
from sinuous.apps.training import Training
from sinuous.vision import distillation
from sinuous.vision.distillation import activation_loss, masked_loss, random_mask
from sinuous.vision.tasks import Distillation


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_equal_features_have_no_loss_and_others_have_the_formulas() -> None:
    x, y = tokens(2, 5, 8), tokens(2, 5, 8)
    assert float(activation_loss(x, x)) == pytest.approx(0, abs=1e-12)
    assert float(activation_loss([x, y], [x, y])) == pytest.approx(0, abs=1e-12)
    total = 0.0
    for a, b in zip(x, y, strict=True):
        for n in range(5):
            rows = [torch.stack([F.cosine_similarity(z[n], z[m], 0) for m in range(5)]) for z in (a, b)]
            total += 1 - float(F.cosine_similarity(*rows, 0))
    assert float(activation_loss(x, y)) == pytest.approx(total / 10)
    assert float(activation_loss([x, x], [x, y])) == pytest.approx(total / 20)


def test_rotating_and_scaling_a_models_tokens_changes_no_activation_loss() -> None:
    x, y = tokens(2, 7, 6), tokens(2, 7, 6)
    rotation, _ = torch.linalg.qr(tokens(6, 6))
    plain = activation_loss(x, y)
    torch.testing.assert_close(activation_loss(x, 3.5 * y @ rotation), plain)
    torch.testing.assert_close(activation_loss(0.2 * x @ rotation, y), plain)
    assert not torch.allclose(activation_loss(x, y + 1), plain), "a shift is no rotation"


def test_widths_may_differ() -> None:
    assert 0 < float(activation_loss(tokens(2, 7, 6), tokens(2, 7, 3))) < 2
    assert activation_loss(torch.randn(1, 4, 6).bfloat16(), torch.randn(1, 4, 3).bfloat16()).dtype == torch.float32


def test_the_masked_loss_is_smooth_l1_over_masked_tokens_alone() -> None:
    x, y = tokens(2, 5, 3), 4 * tokens(2, 5, 3)
    mask = torch.tensor([[True, False, True, False, False], [False, True, False, False, True]])
    distance = (x - y).abs()
    smooth = torch.where(distance < 1, distance**2 / 2, distance - 0.5)
    torch.testing.assert_close(masked_loss(x, y, mask), smooth[mask].mean())
    y.requires_grad_(True)
    masked_loss(x, y, mask).backward()
    assert y.grad is not None
    assert (y.grad[~mask] == 0).all()
    assert (y.grad[mask] != 0).all()
    assert float(masked_loss(x, y, torch.zeros_like(mask)).detach()) == 0


def test_masked_tokens_have_no_gradient_from_activations() -> None:
    x, y = tokens(3, 8, 4), tokens(3, 8, 5).requires_grad_(True)
    mask = random_mask(3, 8, 0.75)
    activation_loss(distillation.visible(x, mask), distillation.visible(y, mask)).backward()
    assert y.grad is not None
    assert (y.grad[mask] == 0).all()
    assert (y.grad[~mask].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(("patches", "share", "masked"), [(49, 0.75, 37), (4, 0.99, 3), (4, 0.01, 1)])
def test_masks_hide_equally_many_patches_of_each_picture_and_never_all(patches: int, share: float, masked: int) -> None:
    mask = random_mask(20, patches, share, torch.Generator().manual_seed(0))
    assert mask.sum(1).tolist() == [masked] * 20
    assert len({tuple(row) for row in mask.tolist()}) > 1


SIZES = {"img_size": 32, "embed_dim": 32, "depth": 4}
VIT_SIZES = {**SIZES, "patch_size": 8, "num_heads": 2}
ISOTROPIC: list[tuple[str, dict[str, Any]]] = [
    ("test_vim", SIZES),
    ("test_vim", {**SIZES, "class_token": "head"}),
    ("test_vim", {**SIZES, "mixer": "ss2d"}),
    ("vit_tiny_patch16_224", VIT_SIZES),
    ("vit_tiny_patch16_224", {**VIT_SIZES, "dynamic_img_size": True}),  # embeds patches as [B, h, w, D]
    ("vit_small_patch14_reg4_dinov2", {**VIT_SIZES, "num_classes": 10}),  # five tokens in front
]
# Those of ours that are registered.
ISOTROPIC += [(name, SIZES) for name in ("test_vir", "test_lightnet", "test_plstm_vis") if timm.is_model(name)]


@pytest.mark.parametrize(("name", "options"), ISOTROPIC)
def test_masked_patches_are_not_read_and_others_are_wherever_class_tokens_stand(
    name: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    x, mask, token = torch.randn(2, 3, 32, 32), random_mask(2, 16, 0.5), torch.randn(32)
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad(), distillation.masked_patches(model, mask, token):
        stages, output = distillation.stages_and_output(model, x, 4)
        _, unseen = distillation.stages_and_output(model, torch.where(hidden, 9.0, x), 4)
        _, seen = distillation.stages_and_output(model, torch.where(hidden, x, 9.0), 4)
    assert torch.equal(output, unseen)
    assert not torch.allclose(output, seen)
    assert [s.shape for s in stages] == [(2, 16, 32)] * 4
    assert output.shape == (2, 16, 32)
    with torch.no_grad():
        free, plain = distillation.stages_and_output(model, x, 4)
        norm = getattr(model, "norm_f", None) or model.norm
        torch.testing.assert_close(plain, norm(free[-1]))
        assert not torch.equal(plain, output)


@pytest.mark.parametrize("teacher", range(len(ISOTROPIC)))
@pytest.mark.parametrize("width", [32, 16])
def test_any_isotropic_model_teaches_any_student_and_stays_as_it_is(teacher: int, width: int) -> None:
    torch.manual_seed(0)
    name, options = ISOTROPIC[teacher]
    known = timm.create_model(name, **options)
    student = timm.create_model("test_vim", num_classes=0, **{**SIZES, "embed_dim": width})
    task = Distillation(known)
    task.prepare(student)
    task.train()
    before = {key: value.clone() for key, value in known.state_dict().items()}
    batch = (torch.randn(4, 3, 32, 32), torch.zeros(4))
    optimizer = torch.optim.AdamW([*student.parameters(), *task.parameters()], lr=3e-3)
    losses = []
    for _ in range(12):
        task.augment = True
        torch.manual_seed(1)  # the same mask
        loss = task.loss(student, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(known.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is not None for p in student.parameters() if p is not student.cls_token)
    assert not known.training
    assert isinstance(task.project, nn.Linear) == (width != 32)
    learned = {key.partition(".")[0] for key in task.state_dict()}
    assert learned == {"mask_token"} | ({"project"} if width != 32 else set())


def test_a_perfect_student_that_sees_everything_loses_nothing() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vim", **SIZES).eval()
    x = torch.randn(2, 3, 32, 32)
    taught, learned = (distillation.stages_and_output(model, x, 4) for _ in range(2))
    assert float(activation_loss(taught[0], learned[0]).detach()) == pytest.approx(0, abs=1e-5)
    assert float(masked_loss(taught[1], learned[1], torch.ones(2, 16, dtype=torch.bool)).detach()) == 0


def test_scores_hide_the_same_patches_each_time() -> None:
    torch.manual_seed(0)
    student = timm.create_model("test_vim", **SIZES).eval()
    found = []
    for _ in range(2):
        task = Distillation(timm.create_model("test_vim", **SIZES).eval(), mask_weight=2.0)
        torch.manual_seed(3)
        task.prepare(student)
        task._teacher = [student]
        with torch.no_grad():
            assert task.score(student, (torch.ones(2, 3, 32, 32).cumsum(-1) / 32, None)) == 2
        found.append({name: float(metric.compute()) for name, metric in task.scores.items()})  # type: ignore[operator]
    assert found[0] == found[1]
    assert found[0]["loss"] == pytest.approx(found[0]["activation_loss"] + 2 * found[0]["masked_loss"])
    assert math.isfinite(found[0]["loss"])
    assert found[0]["loss"] > 0


def test_the_run_trains_what_belongs_to_the_task() -> None:
    student = timm.create_model("test_vim", **{**SIZES, "embed_dim": 16})
    task = Distillation(timm.create_model("test_vim", **SIZES))
    training = Training(student, task, lambda model: torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    optimizer = training.configure_optimizers()
    of_task = optimizer.param_groups[-1]
    assert of_task["weight_decay"] == 0
    assert {id(p) for p in of_task["params"]} == {id(p) for p in (task.mask_token, *task.project.parameters())}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: activation_loss(tokens(2, 5, 3), tokens(2, 4, 3)),
            r"as many pictures and tokens.*\[2, 5, 3\].*\[2, 4",
        ),
        (lambda: activation_loss([tokens(2, 5, 3)], []), r"equally many stages, 1 or more .got 1 and 0"),
        (lambda: activation_loss([], []), "got 0 and 0"),
        (lambda: masked_loss(tokens(1, 4, 3), tokens(1, 4, 2), torch.ones(1, 4).bool()), r"equal widths .got 3 and 2"),
        (lambda: masked_loss(tokens(1, 4, 3), tokens(1, 4, 3), torch.ones(1, 4)), r"mask must be flags .*float32"),
        (lambda: masked_loss(tokens(1, 4, 3), tokens(1, 4, 3), torch.ones(1, 5).bool()), r"\[1, 4\] .got .*\[1, 5\]"),
        (
            lambda: Distillation("vim_nanno.fashion_mnist"),
            "no teacher 'vim_nanno.fashion_mnist'; did you mean 'vim_nano",
        ),
        (lambda: Distillation("test_vim"), "has no weights for 'test_vim'"),
        (lambda: Distillation(timm.create_model("test_resnet")), "the teacher must be an isotropic model.*got ResNet"),
        (lambda: Distillation(timm.create_model("test_vim"), masked=1.0), "task.masked must lie between 0 and 1"),
        (lambda: Distillation(timm.create_model("test_vim"), mask_weight=-1.0), "mask_weight must be 0 or more"),
        (lambda: Distillation(timm.create_model("test_vim"), stages=5), "has 4 blocks for 5 stages; lower task.stages"),
    ],
)
def test_what_does_not_go_together_is_told(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_staged_student_and_other_patches_are_told() -> None:
    task = Distillation(timm.create_model("test_vim", **SIZES))
    with pytest.raises(ValueError, match="the student must be an isotropic model"):
        task.prepare(timm.create_model("test_resnet"))
    student = timm.create_model("test_vim", **{**SIZES, "patch_size": 16})
    task.prepare(student)
    with pytest.raises(ValueError, match="the student has 4 patches and the teacher 16; give them the same img_size"):
        task.loss(student, (torch.randn(1, 3, 32, 32), None))


def test_the_experiment_trains_scores_and_exports_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SINUOUS_OUT", str(tmp_path))
    words = [
        "debug=fast",
        "trainer=cpu",
        "task.teacher=vim_nano.fashion_mnist",
        "+model.embed_dim=16",
        "+model.depth=4",
    ]
    assert cli.main(["train", "experiment=vision/linearizer", *words]) == 0
    (scores,) = tmp_path.rglob("scores.json")
    assert set(json.loads(scores.read_text())["test"]) == {"loss", "activation_loss", "masked_loss"}
    (best,) = tmp_path.rglob("best.safetensors")
    tuned = [
        "debug=fast",
        "trainer=cpu",
        "test=false",
        "+model.embed_dim=16",
        "+model.depth=4",
        f"+model.checkpoint_path={best}",
    ]
    assert cli.main(["train", "experiment=vision/fashion_mnist", *tuned]) == 0
