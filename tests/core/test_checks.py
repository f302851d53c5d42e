from __future__ import annotations

import pytest
import torch

from sinuous.core.checks import check_choice, check_grid, check_place, check_sizes


def test_sizes_of_one_and_more_pass() -> None:
    check_sizes(dim=1, depth=3)
    check_sizes()


def test_the_first_size_below_one_is_named() -> None:
    with pytest.raises(ValueError, match=r"^depth must be at least 1 \(got 0\)$"):
        check_sizes(dim=1, depth=0, width=-1)


@pytest.mark.parametrize(
    ("choices", "listed"),
    [(("a",), "'a'"), (("a", "b"), "'a' or 'b'"), ({"a": 1, "b": 2, "c": 3}, "one of 'a', 'b', 'c'")],
)
def test_a_wrong_choice_is_told_all_choices(choices: tuple[str, ...], listed: str) -> None:
    check_choice("norm", "a", choices)
    with pytest.raises(ValueError, match=rf"^norm must be {listed} \(got 'z'\)$"):
        check_choice("norm", "z", choices)


@pytest.mark.parametrize("block_index", [-1, 2])
def test_a_place_outside_the_model_is_refused(block_index: int) -> None:
    check_place(0, 2)
    check_place(1, 2)
    with pytest.raises(ValueError, match=rf"block_index must be one of the 2 blocks, from 0 \(got {block_index}\)"):
        check_place(block_index, 2)


def test_a_grid_must_be_filled_and_not_packed() -> None:
    check_grid((3, 4), 12, None)
    with pytest.raises(ValueError, match=r"as many cells as there are tokens, 11 \(got 3 x 4\)"):
        check_grid((3, 4), 11, None)
    with pytest.raises(ValueError, match="have no grid"):
        check_grid((3, 4), 12, torch.tensor([0, 12]))
