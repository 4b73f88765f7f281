"""Pairs of line art and picture are moved together, and the ControlNet's measure is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heatsink.models import control, data, evaluate_control


def squares() -> torch.Tensor:
    """Four pairs `(4, 4, 64, 64)`: a grey square, off the middle, on white in every channel."""
    pairs = torch.ones(4, 4, 64, 64)
    pairs[:, :, 20:44, 8:32] = 0.0
    return pairs


@pytest.mark.parametrize("number", range(control.VARIANTS))
def test_picture_and_line_art_move_together(number: int) -> None:
    moved = control.variant(squares(), number)
    for channel in range(4):
        assert torch.equal(moved[:, channel], moved[:, 0])
    # White outside, the square inside: nothing is drawn or lost at the edges of the picture.
    assert (moved[:, 0] > 0.99).any((1, 2)).all()
    assert (moved[:, 0] < 0.01).any((1, 2)).all()
    assert torch.equal(moved, control.variant(squares(), number))


def test_the_first_variants_are_exact_and_the_others_differ() -> None:
    pairs = squares()
    assert torch.equal(control.variant(pairs, 0), pairs)
    assert torch.equal(control.variant(pairs, 1), pairs.flip(-1))
    moved = control.variant(pairs, 2)
    assert not torch.equal(moved[0], moved[1])
    assert not torch.equal(moved, control.variant(pairs, 3))


def test_conditions_are_what_an_image_processor_gives() -> None:
    lines = torch.tensor([[[0, 255], [51, 204]]], dtype=torch.uint8)
    condition = control.condition_of(lines, "cpu")
    assert condition.shape == (1, 3, 2, 2)
    for channel in condition[0]:
        torch.testing.assert_close(channel, torch.tensor([[0.0, 1.0], [0.2, 0.8]]))


def icons(selected: list[bool]) -> data.Icons:
    names = [f"thing {i}" for i in range(len(selected))]
    pictures = np.zeros((len(names), 5, 64, 64, 3), np.uint8)
    return data.Icons(pictures, names, [[]] * len(names), ["x"] * len(names), np.array(selected))


def test_only_unknown_names_are_exchanged_and_only_among_themselves() -> None:
    all_icons = icons([True, False] * 50)
    unknown = np.arange(1, 100, 2)
    subjects = list(range(100))
    whose = control.captioned(all_icons, subjects, unknown, np.random.default_rng(0))
    assert whose[::2] == subjects[::2]
    assert all(i % 2 for i in whose[1::2])
    changed = sum(a != b for a, b in zip(whose, subjects, strict=True))
    # 50 draws with odds of a half: within four standard deviations.
    assert 11 <= changed <= 39


def test_overlap_is_intersection_over_union() -> None:
    def picture(columns: slice) -> np.ndarray:
        out = np.full((1, 8, 8, 3), 255, np.uint8)
        out[:, :, columns, 1] = 100
        return out

    assert evaluate_control.overlap(picture(slice(0, 4)), picture(slice(2, 6))) == pytest.approx(
        2 / 6
    )
    assert evaluate_control.overlap(picture(slice(0, 4)), picture(slice(0, 4))) == 1
    assert evaluate_control.overlap(picture(slice(0, 0)), picture(slice(0, 4))) == 0


def test_measured_subjects_are_held_out_and_split_by_what_the_base_knows() -> None:
    all_icons = icons([i % 3 == 0 for i in range(200)])
    groups = evaluate_control.groups(all_icons, 12)
    held = all_icons.held_out("controlnet")
    for name, known in (("known", True), ("unknown", False)):
        subjects = groups[name]
        assert 0 < len(subjects) <= 12
        assert held[subjects].all()
        assert (all_icons.selected[subjects] == known).all()
