"""Multi-axis checkpointing: gradients of the whole, whatever the cells, and little more kept than checkpoints."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sinuous.core import mixers
from sinuous.core.cells import multi_axis
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.shelves import StateShelf

VOCAB, DIM, LENGTH = 13, 16, 66
CAUSAL = [name for name in mixers.list_mixers() if mixers.mixer_class(name).causal]
GRIDS = [(2, 64), (1, 7), (3, 10**6)]
HYBRID = ["mamba", "softmax_attention"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(pattern: Any = "mamba", depth: int = 3, **options: Any) -> SequenceModel:
    """In float64, with no two parameters alike."""
    model = SequenceModel(VOCAB, DIM, depth, pattern, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def stream(batch: int = 1, length: int = LENGTH, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=dtype)


def tokens(batch: int = 2, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    ids, targets = torch.randint(VOCAB, (2, batch, length)).unbind()
    return ids, torch.where(torch.rand(batch, length) < 0.3, -100, targets)


def chunked(blocks: Any, x: Tensor, steps: int, *, truncated: bool = False) -> Tensor:
    """The plain pass in chunks, each by all blocks, as `multi_axis` goes; truncated, without gradients between them."""
    states: list[Any] = [None] * len(blocks)
    outputs = []
    for part in x.split(min(steps, x.shape[1]), 1):
        shared: tuple[Tensor, ...] = ()
        for n, block in enumerate(blocks):
            more = shared if getattr(block, "shares", False) else ()
            part, states[n], *passed_on = block.prefill(part, states[n], *more)
            shared = tuple(passed_on)
        if truncated:
            states = tree_map_only(Tensor, Tensor.detach, states)
        outputs.append(part)
    return torch.cat(outputs, 1)


def gradients(model: nn.Module, inputs: Tensor, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
    """Of a weighted sum of what `run` gives, by parameters and inputs."""
    model.zero_grad()
    leaf = inputs.clone().requires_grad_(inputs.is_floating_point())
    y = run(leaf)
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    (y * weight).sum().backward()
    named = {name: p.grad for name, p in model.named_parameters()}
    return {name: None if g is None else g.clone() for name, g in {**named, "input": leaf.grad}.items()}


def difference(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> float:
    """The largest difference, of each tensor in units of its largest number."""
    assert {name for name, g in ours.items() if g is None} == {name for name, g in theirs.items() if g is None}
    pairs = [(ours[name], g) for name, g in theirs.items() if g is not None]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs if b.any())


def test_no_causal_mixer_is_left_out() -> None:
    assert len(CAUSAL) > 30


@pytest.mark.parametrize("pattern", [*CAUSAL, HYBRID], ids=str)
def test_gradients_are_those_of_the_whole(pattern: Any) -> None:
    model, x = build(pattern), stream()
    blocks = model.layers
    whole = gradients(blocks, x, blocks)
    for layers, steps in GRIDS:
        ours = gradients(
            blocks, x, lambda x, size=(layers, steps): multi_axis(blocks, x, layers=size[0], steps=size[1])[0]
        )
        assert difference(ours, whole) < 1e-11
        assert difference(ours, gradients(blocks, x, lambda x, s=steps: chunked(blocks, x, s))) < 1e-13


@pytest.mark.parametrize("pattern", ["mamba", "rwkv7", "mlstm", HYBRID], ids=str)
def test_truncated_backpropagation_is_something_else(pattern: Any) -> None:
    model, x = build(pattern), stream()
    whole = gradients(model.layers, x, model.layers)
    truncated = gradients(model.layers, x, lambda x: chunked(model.layers, x, 7, truncated=True))
    assert difference(truncated, whole) > 1e-3


@pytest.mark.parametrize("placement", ["pre", "post", "both"])
@pytest.mark.parametrize("pattern", ["mamba2", "rwkv7", HYBRID], ids=str)
def test_the_loss_of_a_model_has_the_gradients_of_the_whole(pattern: Any, placement: str) -> None:
    model = build(pattern, norm_placement=placement, mlp="swiglu", tie_head=placement == "pre", logit_cap=8.0)
    ids, targets = tokens()

    def loss(x: Tensor) -> Tensor:
        return model.loss(x, targets)

    def plain(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x).flatten(0, 1), targets.flatten())

    for x in (ids, stream(2)):
        model.set_grad_checkpointing(False)
        whole = gradients(model, x, plain)
        assert difference(gradients(model, x, loss), whole) < 1e-11
        for layers, steps in [(2, 25), (3, 10**6), (2, None)]:
            model.set_grad_checkpointing(layers=layers, steps=steps)
            assert difference(gradients(model, x, loss), whole) < 1e-11
            assert difference(gradients(model, x, plain), whole) < 1e-11


def test_gradients_come_through_the_last_state_and_reach_the_given_one() -> None:
    model, x = build(["mamba", "softmax_attention", "rwkv7", "rwkv7"], 4), stream(2, 40)
    _, start = model.layers.prefill(stream(2, 9))
    leaves, form = torch.utils._pytree.tree_flatten(start)
    runs = []
    for run in (model.layers.prefill, lambda x, s: multi_axis(model.layers, x, s, layers=2, steps=16)):
        given = [leaf.detach().requires_grad_() for leaf in leaves]
        y, after = run(x, torch.utils._pytree.tree_unflatten(given, form))
        total = sum(leaf.square().sum() for leaf in torch.utils._pytree.tree_leaves(after))
        runs.append(torch.autograd.grad(y.square().sum() + total, [*given, *model.layers.parameters()]))
        assert type(after[0]) is type(start[0])
    for ours, theirs in zip(*reversed(runs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def test_every_block_runs_twice_over_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, targets) = build(depth=4), tokens()
    calls: list[tuple[int, bool]] = []
    for n, block in enumerate(model.layers):
        prefill = block.prefill

        def counted(*args: Any, n: int = n, prefill: Any = prefill) -> Any:
            calls.append((n, torch.is_grad_enabled()))
            return prefill(*args)

        monkeypatch.setattr(block, "prefill", counted)
    model.set_grad_checkpointing(layers=2, steps=20)
    model.loss(ids, targets).backward()
    assert {call: calls.count(call) for call in calls} == dict.fromkeys(itertools.product(range(4), [False, True]), 4)


class Counter(NamedTuple):
    """A state with parts of every kind."""

    seen: int
    parts: dict[str, list[Tensor]]


class Foreign(nn.Module):
    """A block of a stranger: a running mean with a cache of all inputs, whose state is no mixer's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(DIM, dtype=torch.float64))
        self.drop = DropPath(0.5)

    def prefill(self, x: Tensor, state: Counter | None) -> tuple[Tensor, Counter]:
        total, cache, seen = x.new_zeros(len(x), 1, DIM), x.new_zeros(DIM, 0), 0
        if state is not None:
            (total, cache), seen = state.parts["all"], state.seen
        sums = total + x.cumsum(1)
        count = torch.arange(seen + 1, seen + 1 + x.shape[1], dtype=x.dtype)[:, None]
        cache = torch.cat([cache, (x[0] * self.scale).T], 1)
        y = self.drop(torch.tanh(sums / count * self.scale) + cache.square().mean().sqrt())
        return x + y, Counter(seen + x.shape[1], {"all": [sums[:, -1:], cache]})


def test_blocks_of_strangers_have_states_of_any_form() -> None:
    blocks, x = nn.ModuleList([Foreign() for _ in range(3)]).eval(), stream(2)
    for steps in (7, 64, None):
        ours = gradients(blocks, x, lambda x, s=steps: multi_axis(blocks, x, layers=2, steps=s)[0])
        assert difference(ours, gradients(blocks, x, lambda x, s=steps: chunked(blocks, x, s or LENGTH))) < 1e-13
    _, after = multi_axis(blocks, x, steps=7)
    assert [part.seen for part in after] == [LENGTH] * 3


def test_a_cache_that_grows_is_kept_once() -> None:
    shelf, whole = StateShelf(4), torch.randn(2, 40, 3)
    for slot, length in enumerate((10, 20, 30, 40)):
        shelf.put(slot, (whole[:, :length].clone(), torch.tensor(float(slot)), length))
    assert sum(tensor.numel() for leaf in shelf.leaves for tensor in leaf.tensors) == whole.numel() + 4
    for slot, length in enumerate((10, 20, 30, 40)):
        (cache, number, plain), _ = shelf.get(slot)
        assert torch.equal(cache, whole[:, :length])
        assert (float(number), plain) == (slot, length)


def test_what_grows_in_another_way_is_kept_as_it_comes() -> None:
    shelf, values = StateShelf(3), [torch.randn(2, n) for n in (3, 4, 2)]
    for slot, value in enumerate(values):
        shelf.put(slot, [value] * (slot + 1))
    assert all(torch.equal(shelf.get(slot)[0][0], value) for slot, value in enumerate(values))


def test_shared_values_are_kept_once_for_all_edges() -> None:
    model = build("rwkv7", 4)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        multi_axis(model.layers, stream(), layers=1, steps=16)
    large = {t.data_ptr() for t in kept if t.numel() == LENGTH * DIM}
    assert len(large) == 5  # x, which the caller has, the three edges between blocks, and the values of the first


def test_dropout_is_replayed_in_every_cell() -> None:
    model, x = build(mlp="gelu", drop_rate=0.3).train(), stream(2)
    for layers, steps in ((1, 7), (3, 20)):

        def seeded(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            torch.manual_seed(3)
            return run(x)

        in_cells = functools.partial(multi_axis, model.layers, layers=layers, steps=steps)
        cells = gradients(model.layers, x, lambda x, run=in_cells: seeded(lambda x: run(x)[0], x))
        plain = gradients(model.layers, x, lambda x, s=steps: seeded(lambda x: chunked(model.layers, x, s), x))
        assert difference(cells, plain) < 1e-13


def test_going_back_leaves_the_random_numbers_alone() -> None:
    model, x = build(mlp="gelu", drop_rate=0.3).train(), stream(2).requires_grad_()
    y = multi_axis(model.layers, x, steps=20)[0].sum()
    before = torch.get_rng_state()
    y.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("strangers", [False, True])
def test_stochastic_depth_is_drawn_once_for_each_sequence(strangers: bool) -> None:
    blocks: Any = (
        nn.ModuleList([Foreign() for _ in range(4)]) if strangers else build(mlp="gelu", drop_path_rate=0.6).layers
    )
    blocks.train()
    x = stream(6)

    def whole(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return chunked(blocks, x, LENGTH)

    def cells(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return multi_axis(blocks, x, layers=2, steps=7)[0]

    if strangers:  # whose mean over the whole cache is not that of parts
        y = cells(x)
        rows = ((y - x).abs().sum(-1) == 0).float().mean(1)
        assert set(rows.tolist()) <= {0.0, 1.0}
    else:
        assert difference(gradients(blocks, x, cells), gradients(blocks, x, whole)) < 1e-11
    assert all("forward" not in vars(module) for module in blocks.modules())


@pytest.mark.parametrize("pattern", ["mamba", HYBRID], ids=str)
def test_autocast_is_entered_again(pattern: Any) -> None:
    model, (ids, targets) = build(pattern, dtype=torch.float32, mlp="gelu"), tokens()

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.loss(x, targets)

    whole = gradients(model, ids, loss)
    model.set_grad_checkpointing(layers=2, steps=64)
    cells = gradients(model, ids, loss)
    full = gradients(model.double(), ids, lambda x: model.loss(x, targets))
    assert difference(cells, whole) < 0.1
    rounding, wrong = difference(whole, full), difference(cells, full)
    assert wrong < 1.5 * rounding
    assert rounding > 1e-4  # autocast has been at work


def test_frozen_weights_and_inputs_stay_without_gradients() -> None:
    model, (ids, targets) = build(depth=4), tokens()
    frozen = {"embedding.weight", *(n for n, _ in model.named_parameters() if n.startswith(("layers.0.", "layers.2.")))}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    whole = gradients(model, ids, lambda x: model.loss(x, targets))
    assert {name for name, grad in whole.items() if grad is None} == frozen | {"input"}
    for layers in (1, 2, 4):
        model.set_grad_checkpointing(layers=layers, steps=7)
        assert difference(gradients(model, ids, lambda x: model.loss(x, targets)), whole) < 1e-11


def test_blocks_below_all_that_is_trained_are_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, targets) = build(depth=3, tie_head=False), tokens()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    whole = gradients(model, ids, lambda x: model.loss(x, targets))
    runs: list[int] = []
    prefill = model.layers[0].prefill
    monkeypatch.setattr(model.layers[0], "prefill", lambda *args: runs.append(1) or prefill(*args))
    model.set_grad_checkpointing(steps=33)
    assert difference(gradients(model, ids, lambda x: model.loss(x, targets)), whole) < 1e-11
    assert len(runs) == 2


def test_gradients_add_up_over_calls_and_can_be_asked_for_alone() -> None:
    model, (ids, targets) = build(), tokens()
    model.set_grad_checkpointing(layers=2, steps=16)
    once = gradients(model, ids, lambda x: model.loss(x, targets, reduction="none"))
    loss = model.loss(ids, targets)
    weights = list(model.parameters())
    alone = torch.autograd.grad(loss, weights[3], retain_graph=True)[0]
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        torch.testing.assert_close(weights[3].grad, alone, atol=0, rtol=0)
    loss.backward()
    torch.testing.assert_close(weights[3].grad, 2 * alone, atol=1e-14, rtol=1e-12)
    assert once["embedding.weight"] is not None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_derivatives_and_exchanged_weights_are_refused() -> None:
    model, x = build(), stream().requires_grad_()
    y = multi_axis(model.layers, x, steps=16)[0]
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
    y = multi_axis(model.layers, x, steps=16)[0]
    model.layers[0].mixer.D = nn.Parameter(model.layers[0].mixer.D.detach().clone())
    with pytest.raises(RuntimeError, match="weights were exchanged"):
        y.backward(torch.ones_like(y))


def test_nothing_is_kept_without_gradients() -> None:
    model, x = build(), stream()
    with torch.no_grad():
        y, after = multi_axis(model.layers, x, steps=7)
    torch.testing.assert_close(y, model.layers(x), atol=1e-11, rtol=1e-11)
    assert not y.requires_grad
    assert not after[0].ssm.requires_grad


def test_a_sequence_of_no_steps() -> None:
    model = build()
    y, _ = multi_axis(model.layers, stream(2, 0).requires_grad_(), steps=7)
    assert y.shape == (2, 0, DIM)
    y.sum().backward()
    model.set_grad_checkpointing(steps=7)
    assert model.loss(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)) == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: multi_axis(m.layers, x, layers=0), "layers must be"),
        (lambda m, x: multi_axis(m.layers, x, steps=0), "steps must be"),
        (lambda m, x: multi_axis([], x), "blocks must be one or more"),
        (lambda m, x: multi_axis([nn.Linear(3, 3)], x), "Linear lacks"),
        (lambda m, x: multi_axis(m.layers, x, (None,)), "a part for each of the 3 blocks"),
        (lambda m, x: multi_axis(m.layers, x[0, 0]), r"x must be a tensor \[B, T"),
        (lambda m, x: m.layers(x, torch.tensor([0, 5, LENGTH])), "cu_seqlens does not go with steps=7"),
        (lambda m, x: m.loss(x[..., 0], x[..., 0].long()), "embeddings must be"),
        (lambda m, x: m.loss(x, x[0].long()), "targets must be one for each step"),
        (lambda m, x: m.loss(x, x), "targets must be int64"),
        (lambda m, x: m.loss(x, torch.full((1, LENGTH), 13)), r"between 0 and 12.*\(got 13\)"),
        (lambda m, x: m.loss(x, torch.full((1, LENGTH), 1), reduction="sum"), "reduction must be"),
    ],
)
def test_wrong_calls_are_refused(call: Callable[[SequenceModel, Tensor], Any], words: str) -> None:
    model = build()
    model.set_grad_checkpointing(steps=7)
    with pytest.raises(ValueError, match=words):
        call(model, stream())


def test_steps_are_for_models_that_look_back() -> None:
    with pytest.raises(ValueError, match="causal=False"):
        build(causal=False).set_grad_checkpointing(steps=7)
    with pytest.raises(ValueError, match="layers must be"):
        build().set_grad_checkpointing(layers=0)


@pytest.mark.parametrize("causal", [True, False])
def test_layers_alone_are_for_every_model(causal: bool) -> None:
    model, edges = build("gla", 5, causal=causal, mlp="gelu"), torch.tensor([0, 5, 5, 40, LENGTH])
    ids, targets = tokens(1)
    whole = gradients(model, ids, lambda x: model.loss(x, targets, cu_seqlens=edges))
    runs: list[int] = []
    model.layers[0].mixer.register_forward_hook(lambda *_: runs.append(1))
    model.set_grad_checkpointing(layers=2)
    assert difference(gradients(model, ids, lambda x: model.loss(x, targets, cu_seqlens=edges)), whole) < 1e-12
    assert len(runs) == 2
    _, tapped = model.layers.forward_intermediates(stream(), taps=[0, 2])
    model.set_grad_checkpointing(False)
    assert len(tapped) == 2


def test_positions_reach_the_cells() -> None:
    model, (ids, targets) = (
        build(["mlstm", "softmax_attention"], 4, mixer_options={"mlstm": {"rotary": "head"}}),
        tokens(),
    )
    places = torch.randint(50, ids.shape)
    whole = gradients(model, ids, lambda x: model.loss(x, targets, position_ids=places))
    model.set_grad_checkpointing(layers=2, steps=16)
    assert difference(gradients(model, ids, lambda x: model.loss(x, targets, position_ids=places)), whole) < 1e-11
    assert difference(gradients(model, ids, lambda x: model.loss(x, targets)), whole) > 1e-3


def test_no_target_gives_no_loss_and_ignored_ones_count_nothing() -> None:
    model, (ids, targets) = build(), tokens()
    none = torch.full_like(targets, -100)
    for steps in (None, 16):
        model.set_grad_checkpointing(steps=steps)
        loss = model.loss(ids, none)
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        each = model.loss(ids, targets, reduction="none")
        assert each.shape == targets.shape
        assert not each[targets == -100].any()
        torch.testing.assert_close(model.loss(ids, targets), each.sum() / (targets != -100).sum())
        ignored = torch.where(targets == -100, VOCAB, targets)
        torch.testing.assert_close(model.loss(ids, ignored, ignore_index=VOCAB), model.loss(ids, targets))


@pytest.mark.parametrize("steps", [None, 33])
def test_the_head_goes_in_pieces(steps: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinuous.core.token_loss.PIECE", VOCAB * 5)
    model, (ids, targets) = build(), tokens()
    whole = gradients(model, ids, lambda x: nn.functional.cross_entropy(model(x).flatten(0, 1), targets.flatten()))
    rows: list[int] = []
    head = model.forward_head
    monkeypatch.setattr(model, "forward_head", lambda x: rows.append(x[..., 0].numel()) or head(x))
    model.set_grad_checkpointing(steps is not None, steps=steps)
    assert difference(gradients(model, ids, lambda x: model.loss(x, targets)), whole) < 1e-11
    assert max(rows) <= DIM
    assert sum(rows) == 2 * int((targets != -100).sum())


class Trained(nn.Module):
    """A model whose forward pass is its loss, as `DistributedDataParallel` wants it."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(ids, targets)


def _two_steps(rank: int, folder: str) -> None:
    """Two steps of training in one of two processes, the last gradients written to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = build(HYBRID, 4)
    model.set_grad_checkpointing(layers=2, steps=16)
    parallel = nn.parallel.DistributedDataParallel(Trained(model))
    ids = torch.randint(VOCAB, (2, 2, LENGTH))
    for _ in range(2):
        parallel.zero_grad()
        parallel(ids[rank, :1], ids[rank, 1:]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_in_the_second_step(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_two_steps, (str(tmp_path),), nprocs=2)
    model = build(HYBRID, 4)
    ids = torch.randint(VOCAB, (2, 2, LENGTH))
    for _ in range(2):
        model.zero_grad()
        sum(model.loss(pair[:1], pair[1:]) / 2 for pair in ids).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
    for rank in range(2):
        grads = torch.load(tmp_path / f"{rank}.pt")
        for ours, parameter in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, atol=1e-11, rtol=1e-11)
