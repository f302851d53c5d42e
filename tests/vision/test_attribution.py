"""Implicit attention against its matrix written out, and shares of pixels against the whole network written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sinuous
from sinuous.core import ops
from sinuous.core.registry import list_models
from sinuous.vision.attribution import HeldCoefficients, attention_rows, evidence, integrated_gradients, pixel_shares
from sinuous.vision.datasets import fashion_mnist
from sinuous.vision.vim import Vim


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def matrix(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """M `[B, D, T, T]`, from its definition."""
    if reverse:
        return matrix(delta.flip(1), A, B.flip(1), C.flip(1), False).flip(2, 3)
    passed = delta.cumsum(1)
    since = passed[:, :, None] - passed[:, None]
    later = torch.ones(since.shape[1:3]).triu(1).bool()
    decay = torch.exp(A * since.masked_fill(later[None, :, :, None], torch.inf)[..., None])
    return torch.einsum("btn,btsdn,bsd,bsn->bdts", C, decay, delta, B)


def scan_inputs(length: int = 13) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "u": random(2, length, 5),
        "dt": random(2, length, 5),
        "A": -random(5, 3).exp(),
        "B": random(2, length, 3),
        "C": random(2, length, 3),
        "dt_bias": random(5),
    }


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_the_matrix_is_the_scan(reverse):
    x = scan_inputs()
    M = matrix(F.softplus(x["dt"] + x["dt_bias"]), x["A"], x["B"], x["C"], reverse)
    y = ops.selective_scan(**x, reverse=reverse)
    torch.testing.assert_close(torch.einsum("bdts,bsd->btd", M, x["u"]), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_rows_are_rows_of_the_matrix(reverse):
    x = scan_inputs()
    M = matrix(F.softplus(x["dt"] + x["dt_bias"]), x["A"], x["B"], x["C"], reverse)
    one = torch.zeros_like(x["u"])
    one[:, 6] = 1
    torch.testing.assert_close(attention_rows(one, **x, reverse=reverse), M[:, :, 6].mT, rtol=1e-10, atol=1e-10)
    weights = random(*x["u"].shape)
    mixed = torch.einsum("btd,bdts->bsd", weights, M)
    torch.testing.assert_close(attention_rows(weights, **x, reverse=reverse), mixed, rtol=1e-10, atol=1e-10)


def test_a_row_costs_no_matrix():
    length = 4096
    torch.manual_seed(0)
    u, dt, B, C = (torch.randn(1, length, n) for n in (8, 8, 2, 2))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)]
            largest = max([largest, *sizes])
            return found

    with Watch():
        attention_rows(torch.ones_like(u), u, dt - 4, -torch.ones(8, 2), B, C)
    assert 0 < largest <= length * 8


def model(**options) -> Vim:
    torch.manual_seed(0)
    vim = Vim(img_size=12, patch_size=3, in_chans=2, num_classes=4, embed_dim=16, depth=3, d_state=3, **options)
    with torch.no_grad():
        for parameter in vim.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vim.double().eval()


def held_network(vim: Vim, image: Tensor, at: Tensor) -> Tensor:
    """Logits of the network on `at` whose coefficients are those of `image`, with every scan a matrix."""

    def embed(x: Tensor) -> Tensor:
        x = vim.patch_embed.proj(x).flatten(2).mT
        half = x.shape[1] // 2
        return torch.cat((x[:, :half], vim.cls_token.expand(len(x), -1, -1), x[:, half:]), 1) + vim.pos_embed

    def scale(x: Tensor, norm: torch.nn.Module) -> Tensor:
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)

    x, h = embed(image), embed(at)
    for block in vim.layers:
        mixer, factor = block.mixer, scale(x, block.norm) * block.norm.weight
        (wide, gate), (wide_h, _) = (mixer.in_proj(t * factor).chunk(2, -1) for t in (x, h))
        y = y_h = 0
        for b, reverse in (("", False), ("_b", True)):
            conv, A = getattr(mixer, f"conv1d{b}"), -torch.exp(getattr(mixer, f"A{b}_log"))

            def filtered(t: Tensor, conv=conv, reverse=reverse) -> Tensor:
                t = t.flip(1) if reverse else t
                t = conv(t.mT)[..., : t.shape[1]].mT
                return t.flip(1) if reverse else t

            before = filtered(wide)
            u, u_h = (t * torch.sigmoid(before) for t in (before, filtered(wide_h)))
            projection = getattr(mixer, f"dt_proj{b}")
            dt, B, C = getattr(mixer, f"x_proj{b}")(u).split((projection.in_features, A.shape[1], A.shape[1]), -1)
            M = matrix(F.softplus(projection(dt)), A, B, C, reverse)
            skip = getattr(mixer, f"D{b}")
            y = y + torch.einsum("bdts,bsd->btd", M, u) + skip * u
            y_h = y_h + torch.einsum("bdts,bsd->btd", M, u_h) + skip * u_h
        x, h = (t + mixer.out_proj(v * F.silu(gate) / 2) for t, v in ((x, y), (h, y_h)))
    middle = x.shape[1] // 2
    return vim.head((h * scale(x, vim.norm_f) * vim.norm_f.weight)[:, middle])


def test_shares_add_up_to_the_score():
    vim, images, baseline = model(), random(3, 2, 12, 12), random(1, 2, 12, 12)
    torch.testing.assert_close(held_network(vim, images, images), vim(images), rtol=1e-10, atol=1e-10)
    classes = torch.tensor([2, 0, 3])
    found = evidence(vim, images, baseline=baseline, classes=classes)
    torch.testing.assert_close(found.logits, vim(images), rtol=1e-10, atol=1e-10)
    without = held_network(vim, images, baseline.expand_as(images))
    share = (found.logits - without).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(found.pixels.sum((1, 2)), share, rtol=1e-10, atol=1e-10)
    patch = images.clone()
    patch[:, :, 3:9, 6:12] = baseline[:, :, 3:9, 6:12]
    share = (found.logits - held_network(vim, images, patch)).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(found.pixels[:, 3:9, 6:12].sum((1, 2)), share, rtol=1e-10, atol=1e-10)


def test_pictures_and_classes_make_maps_of_their_own():
    vim, images = model(), random(2, 2, 12, 12)
    both = evidence(vim, images)
    assert torch.equal(both.classes, vim(images).argmax(-1))
    alone = evidence(vim, images[1:])
    torch.testing.assert_close(both.pixels[1:], alone.pixels, rtol=1e-9, atol=1e-12)
    other = evidence(vim, images, classes=(both.classes + 1) % 4)
    assert not torch.allclose(other.pixels, both.pixels, rtol=0.1)


def test_holding_changes_gradients_and_no_output():
    vim, image = model(), random(1, 2, 12, 12).requires_grad_()
    plain = vim(image)
    with HeldCoefficients():
        held = vim(image)
    torch.testing.assert_close(held, plain, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(y[0, 0], image)[0] for y in (plain, held)]
    assert not torch.allclose(*slopes, rtol=0.1)


def test_parameters_get_no_gradients():
    vim = model()
    evidence(vim, random(1, 2, 12, 12))
    assert all(parameter.grad is None for parameter in vim.parameters())


def test_a_mixer_that_holding_does_not_make_linear_is_refused():
    class Attention(sinuous.core.mixers.Mixer):
        causal = True
        constant_state = False

    vim = model()
    vim.layers[1].mixer = Attention()
    with pytest.raises(ValueError, match="Attention"):
        evidence(vim, random(1, 2, 12, 12))


@pytest.mark.skipif(
    not list_models("vim_nano.fashion_mnist", pretrained=True), reason="the weights of vim_nano are not installed"
)
def test_blacking_out_what_spoke_for_a_class_unseats_it_sooner_than_chance():
    """The deletion test: 7 x 7 patches turn black, the one with the most evidence first."""
    vim = sinuous.load("vim_nano.fashion_mnist").eval()
    mean, std = (vim.pretrained_cfg[key][0] for key in ("mean", "std"))
    pixels = torch.tensor(fashion_mnist("test").images[:40])[:, None].float() / 255
    found = evidence(vim, (pixels - mean) / std, baseline=-mean / std)
    patches = F.avg_pool2d(found.pixels[:, None], 4).flatten(1)

    def confidence(order: Tensor) -> float:
        """Mean probability of the class explained while patches go black in `order`."""
        kept, means = torch.ones(len(pixels), 49), []
        for step in order.T[:24]:
            kept.scatter_(1, step[:, None], 0)
            seen = pixels * F.interpolate(kept.view(-1, 1, 7, 7), scale_factor=4)
            with torch.no_grad():
                probabilities = vim((seen - mean) / std).softmax(-1)
            means.append(probabilities.gather(1, found.classes[:, None]).mean().item())
        return sum(means) / len(means)

    torch.manual_seed(0)
    most, least = confidence(patches.argsort(descending=True)), confidence(patches.argsort())
    chance = confidence(torch.rand_like(patches).argsort())
    assert most < chance - 0.1 < chance + 0.1 < least


def test_one_class_may_be_explained_for_all_pictures() -> None:
    model = sinuous.create_model("test_vim", num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    one = evidence(model, images, classes=torch.tensor([3]))
    each = evidence(model, images, classes=torch.tensor([3, 3]))
    assert torch.equal(one.pixels, each.pixels)
    assert one.pixels[1].abs().max() > 0
    for wrong in (torch.tensor([1, 2, 3]), torch.tensor(1)):
        with pytest.raises(ValueError, match="one class for each of the 2 pictures, or one for all"):
            evidence(model, images, classes=wrong)


def test_integrated_gradients_add_up_to_what_the_picture_changes() -> None:
    torch.manual_seed(0)
    model = sinuous.create_model("test_vmamba", num_classes=5, dtype=torch.float64).eval()
    images, baseline = (
        torch.randn(2, 3, 32, 32, dtype=torch.float64),
        torch.full((1, 3, 1, 1), 0.3, dtype=torch.float64),
    )
    images[0, :, :8] = 0.3
    shares = integrated_gradients(model, images, baseline=baseline, steps=200)
    with torch.no_grad():
        start = model(baseline.expand_as(images)).gather(1, shares.classes[:, None])
        end = model(images).gather(1, shares.classes[:, None])
    torch.testing.assert_close(shares.pixels.sum((1, 2)), (end - start)[:, 0], rtol=2e-3, atol=1e-5)
    assert not shares.pixels[0, :8].any()
    with pytest.raises(ValueError, match="steps must"):
        integrated_gradients(model, images, steps=0)


def test_every_classifier_has_shares_and_vim_the_held_ones() -> None:
    vim, images = sinuous.create_model("test_vim", num_classes=5).eval(), torch.randn(1, 3, 64, 64)
    assert torch.equal(pixel_shares(vim, images).pixels, evidence(vim, images).pixels)
    for other in (sinuous.create_model("test_vim", num_classes=5, mixer="gla"), torch.nn.Sequential()):
        other.append(torch.nn.Flatten()) if isinstance(other, torch.nn.Sequential) else other.eval()
        assert torch.equal(pixel_shares(other, images).pixels, integrated_gradients(other, images).pixels)
