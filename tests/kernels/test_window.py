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
    stride = draw(st.integers(1, kernel_size))
    dilation, query_stride, counted = draw(st.integers(1, 4)), 1, False
    if draw(st.booleans()):
        dilation, query_stride = 1, draw(st.integers(1, 4))
        counted = stride % query_stride == 0 and draw(st.booleans())
    boundary, offset = draw(st.sampled_from(BOUNDARIES)), 0
    if query_stride == 1 and boundary != "shift":
        offset = draw(st.integers(0, stride - 1))
    rule = Window(kernel_size, stride, dilation, boundary, query_stride, counted, offset)
    shortest = rule.kernel_size * rule.dilation if rule.boundary == "shift" else 1
    return rule, draw(st.integers(shortest, shortest + 30))


@given(windows())
@settings(max_examples=300)
def test_keys_follow_the_formula(case):
    rule, length = case
    position, inside, row = rule.keys(length)
    places = range(0, length, rule.query_stride)
    assert len(places) == rule.queries(length) == len(row)
    for q, x in enumerate(places):
        counted_by = rule.query_stride if rule.counted else None
        expected = naive_window(
            x, length, rule.kernel_size, rule.stride, rule.dilation, rule.boundary, counted_by, rule.offset
        )
        assert row[q].tolist() == [r for _, r in expected]
        assert inside[q].tolist() == [p is not None for p, _ in expected]
        assert [p for p, i in zip(position[q].tolist(), inside[q].tolist(), strict=True) if i] == [
            p for p, _ in expected if p is not None
        ]
        assert row[q].min() >= 0 and row[q].max() <= 2 * rule.kernel_size - 2  # every key has a row in the table


@given(windows())
@settings(max_examples=200)
def test_integer_and_tensor_rule_agree(case):
    rule, length = case
    group = rule.group_length(length)
    queries = rule.queries(group)
    assert rule.starts(torch.arange(queries), group).tolist() == [rule.start(i, group) for i in range(queries)]


@given(windows(), st.integers(1, 24))
@settings(max_examples=300)
def test_every_tile_spans_the_windows_of_its_queries(case, tile):
    rule, length = case
    group = rule.group_length(length)
    queries = rule.queries(group)
    axis = tiling.cut(rule, 0, 1, group, min(tile, queries))
    assert axis.tiles * axis.tile == axis.ahead + queries + axis.ragged
    assert min(axis.before, axis.after, axis.ahead, axis.ragged) >= 0
    assert (axis.tiles - 1) * axis.step + axis.span == axis.before + group + axis.after  # the spans hold the whole map
    for i in range(queries):
        base = (i + axis.ahead) // axis.tile * axis.step - axis.before
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


def test_halo_window_of_every_second_query():
    """The same windows; offsets are those of the positions, or counted one by one."""
    whole = Window(14, stride=8, boundary="zero").keys(29)
    for counted, first in ((False, 8), (True, 9)):
        position, inside, row = Window(14, stride=8, boundary="zero", query_stride=2, counted=counted).keys(29)
        assert len(position) == 15
        assert torch.equal(position, whole[0][::2]) and torch.equal(inside, whole[1][::2])
        assert torch.equal(row, whole[2][::2]) is not counted
        assert torch.equal(row[4::4], whole[2][8::8])
        assert row[5].tolist() == list(range(first, first + 14))  # keys from 5 on, the query at 10 or counted as 9


def test_shifted_windows_are_blocks_too():
    """Swin's: the tiles are the blocks, and only keys outside the map are masked."""
    rule = Window(7, 7, boundary="mask", offset=3)
    position, inside, _ = rule.keys(28)
    assert [p[i].tolist() for p, i in zip(position[[0, 2, 3, 9, 27]], inside[[0, 2, 3, 9, 27]], strict=True)] == [
        [0, 1, 2], [0, 1, 2], [*range(3, 10)], [*range(3, 10)], [24, 25, 26, 27],
    ]  # fmt: skip
    axis = tiling.cut(rule, 0, 1, 28, 7)
    assert (axis.tiles, axis.span, axis.ahead, axis.ragged, axis.before, axis.after) == (5, 7, 4, 3, 4, 3)
    assert axis.order == (0, 1, 1, 1, 2)


@pytest.mark.parametrize(("length", "dilation"), [(56, 8), (57, 8), (23, 5)])
def test_plan_covers_every_position_once(length, dilation):
    rule = Window(2, dilation=dilation)
    covered = []
    for rows, _ in tiling.plan(rule, Window(1), length, 1, tiled._cost):
        covered += [i * dilation + g for g in range(rows.first, rows.stop) for i in range(rows.length)]
    assert sorted(covered) == list(range(length))
