"""The first xLSTM models: their blocks, where the sLSTM blocks stand, and the authors' weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sinuous
from sinuous.core.language.models import checkpoint_filter_fn
from sinuous.core.mixers import MLSTM, SLSTM, Mixer
from sinuous.core.sequence_model import SequenceModel

VOCAB, DIM, DEPTH = 11, 16, 3
PATTERN = ("mlstm", "slstm", "mlstm")
UP = 64  # 1.3 · 16, rounded up


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def create(**options: Any) -> SequenceModel:
    return sinuous.create_model(
        "xlstm_14m", **{"vocab_size": VOCAB, "dim": DIM, "depth": DEPTH, "pattern": PATTERN, **options}
    ).eval()


def layer(block: int) -> Mixer:
    if PATTERN[block] == "mlstm":
        return MLSTM(DIM, num_blocks=DEPTH, dtype=torch.float64)
    return SLSTM(DIM, num_blocks=DEPTH, block_index=block, dtype=torch.float64)


def published() -> dict[str, Tensor]:
    """Weights as the authors' language model names them, no two alike."""
    state = {
        "token_embedding.weight": torch.randn(VOCAB, DIM),
        "lm_head.weight": torch.randn(VOCAB, DIM),
        "xlstm_block_stack.post_blocks_norm.weight": torch.randn(DIM),
    }
    for i in range(DEPTH):
        block = f"xlstm_block_stack.blocks.{i}."
        state[block + "xlstm_norm.weight"] = torch.randn(DIM)
        state.update({f"{block}xlstm.{name}": torch.randn(t.shape) * 0.3 for name, t in layer(i).state_dict().items()})
        if PATTERN[i] == "slstm":
            state[block + "ffn_norm.weight"] = torch.randn(DIM)
            state[block + "ffn.proj_up.weight"] = torch.randn(2 * UP, DIM)
            state[block + "ffn.proj_down.weight"] = torch.randn(DIM, UP)
    return {name: tensor.double() for name, tensor in state.items()}


def by_the_authors_names(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Features of embeddings: residual blocks whose norms keep their weight's difference from one."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, [DIM], 1 + state[f"xlstm_block_stack.{name}.weight"])

    for i in range(DEPTH):
        block, mixer = f"blocks.{i}.", layer(i)
        prefix = f"xlstm_block_stack.{block}"
        mixer.load_state_dict({n.split(".xlstm.")[1]: t for n, t in state.items() if n.startswith(prefix + "xlstm.")})
        x = x + mixer(norm(x, block + "xlstm_norm"))
        if PATTERN[i] == "slstm":
            up = norm(x, block + "ffn_norm") @ state[prefix + "ffn.proj_up.weight"].T
            x = x + (F.gelu(up[..., :UP]) * up[..., UP:]) @ state[prefix + "ffn.proj_down.weight"].T
    return norm(x, "post_blocks_norm")


@pytest.mark.parametrize("wrapped", ["", "model."])
def test_published_weights_give_their_logits(tmp_path: Path, wrapped: str) -> None:
    state, ids = published(), torch.randint(VOCAB, (2, 9))
    torch.save({wrapped + name: tensor for name, tensor in state.items()}, tmp_path / "xlstm.pt")
    model = create(checkpoint_path=tmp_path / "xlstm.pt", dtype=torch.float64)
    features = by_the_authors_names(state, state["token_embedding.weight"][ids])
    torch.testing.assert_close(model(ids), features @ state["lm_head.weight"].T, atol=1e-9, rtol=1e-9)


def test_weights_of_the_stack_alone_give_its_features() -> None:
    state, x = published(), torch.randn(2, 9, DIM, dtype=torch.float64)
    stack = {n.removeprefix("xlstm_block_stack."): t for n, t in state.items() if n.startswith("xlstm_block_stack.")}
    model = create(dtype=torch.float64)
    missing, unexpected = model.load_state_dict(checkpoint_filter_fn(stack, model), strict=False)
    assert set(missing) == {"embedding.weight", "head.weight"}
    assert not unexpected
    torch.testing.assert_close(model.forward_features(x), by_the_authors_names(state, x), atol=1e-10, rtol=0)


def test_cells_made_for_the_cuda_kernel_have_their_gates_put_in_order() -> None:
    state, heads, size = published(), 4, DIM // 4
    cell = "xlstm_block_stack.blocks.1.xlstm.slstm_cell."
    kernel, bias = state[cell + "_recurrent_kernel_"], state[cell + "_bias_"]
    # There the kernel is [H, in, gate, out] and the bias [H, gate, out], both flat from the right.
    other = torch.einsum("hgoi->higo", kernel.reshape(heads, 4, size, size)).reshape(heads, size, 4 * size)
    swapped = torch.einsum("gho->hgo", bias.reshape(4, heads, size)).reshape(-1)
    for_cuda = {**state, cell + "_recurrent_kernel_": other, cell + "_bias_": swapped}
    found, expected = (checkpoint_filter_fn(each, create()) for each in (for_cuda, state))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_our_own_weights_load_unchanged() -> None:
    model = create()
    found = checkpoint_filter_fn(model.state_dict(), model)
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("pattern", "depth", "slstm_at"),
    [
        (("mlstm",) * 7 + ("slstm",), 16, [7, 15]),  # xLSTM[7:1]
        ("mlstm", 4, []),  # xLSTM[1:0]
        ("slstm", 3, [0, 1, 2]),  # xLSTM[0:1]
        (("mlstm", "slstm", "slstm", "mlstm"), 4, [1, 2]),  # any places
    ],
)
def test_the_pattern_says_where_slstm_blocks_are(pattern: Any, depth: int, slstm_at: list[int]) -> None:
    model = create(pattern=pattern, depth=depth)
    assert [i for i, block in enumerate(model.layers) if isinstance(block.mixer, SLSTM)] == slstm_at
    assert [i for i, block in enumerate(model.layers) if block.mixes_channels] == slstm_at
    assert all(block.mixer.num_blocks == depth for block in model.layers)
    assert [model.layers[i].mixer.block_index for i in slstm_at] == slstm_at


@pytest.mark.parametrize("prefix", [0, 1, 5, 9])
def test_prefill_and_steps_equal_forward(prefix: int) -> None:
    model, ids = create(dtype=torch.float64), torch.randint(VOCAB, (2, 9))
    model.load_state_dict(checkpoint_filter_fn(published(), model))
    y, state = model.prefill(ids[:, :prefix], model.initial_state(2))
    outputs = [y]
    for ids_t in ids[:, prefix:].unbind(1):
        y_t, state = model.step(ids_t, state)
        outputs.append(y_t[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), model(ids), atol=1e-9, rtol=1e-9)


def test_every_parameter_gets_a_gradient_and_the_cells_no_weight_decay() -> None:
    model = create(dtype=torch.float64)
    model.load_state_dict(checkpoint_filter_fn(published(), model))
    model(torch.randint(VOCAB, (2, 9))).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    cell = "layers.1.mixer.slstm_cell."
    assert {cell + "_recurrent_kernel_", cell + "_bias_"} <= model.no_weight_decay()
