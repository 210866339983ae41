"""Block table rows: null-filled, owned one by one, growing in both directions."""

import numpy as np

from rayk.kvcache.block_table import BlockTable


def test_rows_start_null_and_grow_when_they_run_out() -> None:
    table = BlockTable(null_page=7, rows=2, width=3)
    rows = [table.acquire() for _ in range(5)]
    assert sorted(set(rows)) == sorted(rows)
    assert (table.cells[rows] == 7).all()
    assert table.cells.shape == (8, 3)


def test_growing_keeps_what_the_rows_show() -> None:
    table = BlockTable(7, 1, width=2)
    first = table.acquire()
    table.cells[first] = [4, 5]
    second = table.acquire()
    table.widen(3)
    assert table.cells.shape == (2, 4)
    assert table.cells[first].tolist() == [4, 5, 7, 7]
    assert table.cells[second].tolist() == [7, 7, 7, 7]
    table.widen(2)
    assert table.cells.shape == (2, 4)


def test_one_long_request_widens_to_just_what_it_needs() -> None:
    table = BlockTable(7, 1, width=2)
    table.widen(100)
    assert table.cells.shape == (1, 100)


def test_a_dropped_row_is_null_again_and_handed_out_next() -> None:
    table = BlockTable(7, 2, width=3)
    row = table.acquire()
    table.cells[row, :2] = [1, 2]
    table.drop(row, 2)
    assert table.acquire() == row
    assert (table.cells[row] == 7).all()


def test_a_pool_of_no_rows_still_serves() -> None:
    table = BlockTable(0, 0)
    assert table.cells.dtype == np.int32
    assert table.acquire() == 0
