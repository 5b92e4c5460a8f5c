import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.kernels import tiling
from foveal.kernels.neighborhood import tiled
from foveal.kernels.window import BOUNDARIES, Window

from .naive import window as naive_window


@st.composite
def windows(draw):
    kernel_size = draw(st.integers(1, 9))
    rule = Window(
        kernel_size, draw(st.integers(1, kernel_size)), draw(st.integers(1, 4)), draw(st.sampled_from(BOUNDARIES))
    )
    shortest = rule.kernel_size * rule.dilation if rule.boundary == "shift" else 1
    return rule, draw(st.integers(shortest, shortest + 30))


@given(windows())
@settings(max_examples=300, deadline=None)
def test_keys_follow_the_formula(case):
    rule, length = case
    position, inside, row = rule.keys(length)
    for x in range(length):
        expected = naive_window(x, length, rule.kernel_size, rule.stride, rule.dilation, rule.boundary)
        assert row[x].tolist() == [r for _, r in expected]
        assert inside[x].tolist() == [p is not None for p, _ in expected]
        assert [p for p, i in zip(position[x].tolist(), inside[x].tolist(), strict=True) if i] == [
            p for p, _ in expected if p is not None
        ]
        assert row[x].min() >= 0 and row[x].max() <= 2 * rule.kernel_size - 2  # every key has a row in the table


@given(windows())
@settings(max_examples=200, deadline=None)
def test_integer_and_tensor_rule_agree(case):
    rule, length = case
    group = rule.group_length(length)
    assert rule.starts(torch.arange(group), group).tolist() == [rule.start(i, group) for i in range(group)]


@given(windows(), st.integers(1, 24))
@settings(max_examples=300, deadline=None)
def test_every_tile_spans_the_windows_of_its_queries(case, tile):
    rule, length = case
    group = rule.group_length(length)
    axis = tiling.cut(rule, 0, 1, group, min(tile, group))
    assert axis.tiles * axis.tile == group + axis.ragged
    assert min(axis.before, axis.after, axis.ragged) >= 0
    for i in range(group):
        base = i // axis.tile * axis.tile - axis.before
        assert base <= rule.start(i, group) and rule.start(i, group) + rule.kernel_size <= base + axis.span
    assert [p for start, stop, p in axis.runs for _ in range(start, stop)] == list(axis.order)
    assert len(axis.order) == axis.tiles


def test_shared_windows_of_blocks():
    """stride = kernel size, dividing the map: the windows are the blocks, and no mask is needed."""
    rule = Window(7, stride=7)
    position, _, _ = rule.keys(28)
    assert position[:, 0].tolist() == [x // 7 * 7 for x in range(28)]
    ((rows, columns),) = tiling.plan(rule, rule, 28, 28, tiled._cost)
    assert rows.span == columns.span == 7 and not rows.masked and not columns.masked


def test_halo_window():
    """Block 8, halo 3: the window is the block and three positions on each side of it."""
    position, inside, _ = Window(14, stride=8, boundary="zero").keys(32)
    assert position[8].tolist() == list(range(5, 19)) == position[15].tolist()
    assert inside[0].tolist() == [False] * 3 + [True] * 11


@pytest.mark.parametrize(("length", "dilation"), [(56, 8), (57, 8), (23, 5)])
def test_plan_covers_every_position_once(length, dilation):
    rule = Window(2, dilation=dilation)
    covered = []
    for rows, _ in tiling.plan(rule, Window(1), length, 1, tiled._cost):
        covered += [i * dilation + g for g in range(rows.first, rows.stop) for i in range(rows.length)]
    assert sorted(covered) == list(range(length))
