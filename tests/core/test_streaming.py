"""States go through files and come back the same, and no file does more than hold tensors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sinuous.core import mixers
from sinuous.core.mixers import contract
from sinuous.core.nn import Recurrent
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.streaming import load_state, save_state, state_metadata

DIM = 24
CAUSAL = [name for name in mixers.list_mixers() if mixers.mixer_class(name).causal]


def assert_same(actual: Any, expected: Any) -> None:
    leaves, form = pytree.tree_flatten(actual)
    wanted, wanted_form = pytree.tree_flatten(expected)
    assert form == wanted_form
    for leaf, original in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf, original, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CAUSAL)
def test_every_mixer_goes_on_from_a_saved_state(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    mixer = mixers.build_mixer(name, DIM, dtype=dtype)
    x = torch.randn(2, 9, DIM, dtype=dtype)
    with torch.no_grad():
        for start in (mixer.initial_state(2), mixer.prefill(x[:, :6])[1]):
            save_state(start, tmp_path / "state")
            restored = load_state(tmp_path / "state")
            assert type(restored) is type(start)
            assert_same(restored, start)
            assert_same(mixer.prefill(x[:, 6:], restored), mixer.prefill(x[:, 6:], start))


@pytest.mark.parametrize("name", CAUSAL)
def test_torch_reads_states_with_weights_only_rules(name: str) -> None:
    state, file = mixers.build_mixer(name, DIM).initial_state(2), io.BytesIO()
    torch.save({"state": (state, None)}, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), {"state": (state, None)})


def test_models_and_layers_go_on_with_words_kept(tmp_path: Path) -> None:
    model = SequenceModel(13, DIM, 3, ["mamba", "softmax_attention", "rwkv7"]).eval()
    ids = torch.randint(0, 13, (2, 9))
    _, state = model.prefill(ids[:, :6])
    save_state(state, tmp_path / "model", {"read": "sechs Zeichen – ß"})
    assert state_metadata(tmp_path / "model") == {"read": "sechs Zeichen – ß"}
    assert_same(model.prefill(ids[:, 6:], load_state(tmp_path / "model", "cpu")), model.prefill(ids[:, 6:], state))
    layer = Recurrent("gla", 5, DIM, num_layers=2, bidirectional=True)
    _, state = layer(torch.randn(4, 2, 5))
    save_state(state, tmp_path / "layer")
    assert_same(load_state(tmp_path / "layer"), state)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["layer", "model"]


def test_nested_tuples_none_views_and_shared_tensors_come_back(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    state = (base.T, None, (base[1:], (), (None, base > 3)), torch.empty(0, 5, dtype=torch.int32), base)
    save_state(state, tmp_path / "state")
    assert_same(load_state(tmp_path / "state"), state)
    assert str(load_state(tmp_path / "state", "meta")[0].device) == "meta"


class Unknown(NamedTuple):
    tensor: Tensor


@pytest.mark.parametrize(
    ("state", "place"),
    [
        (Unknown(torch.ones(1)), "state"),
        ((torch.ones(1), (3.0,)), r"state\[1\]\[0\]"),
        ([torch.ones(1)], "state"),
        ({"a": torch.ones(1)}, "state"),
        ("abc", "state"),
        (mixers.MambaState(torch.ones(1), "abc"), "state.ssm"),
    ],
)
def test_what_is_no_state_is_not_written(state: Any, place: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{place} must be a tensor, a tuple or a registered state \(got "):
        save_state(state, tmp_path / "state")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, "abc", {"sinuous.state": "a"}])
def test_metadata_are_words(metadata: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metadata must"):
        save_state((), tmp_path / "state", metadata)


def test_a_file_that_is_no_state_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_state(path)
    save_state(mixers.build_mixer("mamba", DIM).initial_state(1), path)
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[:100], whole[:4], b"", b"x" * 200, whole[:8] + b"}" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or no safetensors file"):
            load_state(path)
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no state but other tensors"):
        load_state(path)
    for form in ("[", "[0]", "7", '["", [0, 1]]', '{"a": 0}', '"os.system"', '["", "ab"]', "1.5"):
        safetensors.torch.save_file({"0": torch.ones(2)}, path, {"sinuous.state": form})
        with pytest.raises(ValueError, match="is damaged"):
            load_state(path)
    for name in ("os.system", "builtins.eval", "sinuous.core.mixers.mamba.Mamba"):
        safetensors.torch.save_file({"0": torch.ones(2)}, path, {"sinuous.state": f'["{name}", [0]]'})
        with pytest.raises(ValueError, match="which no mixer has registered"):
            load_state(path)
    path.write_bytes(whole)
    monkeypatch.delitem(contract._STATES, "sinuous.core.mixers.mamba.MambaState")
    with pytest.raises(ValueError, match=r"'sinuous.core.mixers.mamba.MambaState', which no mixer has registered"):
        load_state(path)


def test_a_state_of_another_model_is_told(tmp_path: Path) -> None:
    model = SequenceModel(13, DIM, 2)
    ids = torch.tensor([[1, 2]])
    for other in (SequenceModel(13, DIM, 3), SequenceModel(13, 2 * DIM, 2), SequenceModel(13, DIM, 2, "gla")):
        save_state(other.initial_state(1), tmp_path / "state")
        state = load_state(tmp_path / "state")
        with pytest.raises(ValueError, match=r"^state.* must .*\(got "):
            model.prefill(ids, state)
        with pytest.raises(ValueError, match=r"^state.* must .*\(got "):
            model.step(ids[:, 0], state)
