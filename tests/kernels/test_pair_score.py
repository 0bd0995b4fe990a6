"""The CPU kernel at every instruction set, and the PyTorch reference, against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.pair_score import gather_multiply_sum
from flipkd.errors import KernelError
from flipkd.kernels import pair_score as kernel
from flipkd.kernels.native import native
from flipkd.kernels.pair_score import LEVELS, pair_score
from flipkd.vectors.rows import DTYPES, VectorRows, quantise
from tests.guarded import guarded
from tests.vectors.dequantise import dequantise

needs_library = pytest.mark.skipif(native() is None, reason="installed without a compiler")
# every instruction set that this machine has, and the reference
BEST = 0 if native() is None else native().flipkd_pair_score_level()
WAYS = [*(LEVELS[: BEST + 1] if native() is not None else ()), "reference"]
DIMS = (1, 3, 16, 63, 64, 65, 127, 128, 129, 384)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set of the compiled library, or the reference; pair_score uses it."""
    use(request.param, monkeypatch)
    return str(request.param)


def use(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLIPKD_PAIR_SCORE", "reference" if way == "reference" else "cpu")
    if way != "reference":
        monkeypatch.setenv("FLIPKD_CPU_LEVEL", way)


def make_rows(rows: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float32)


def exact(rows: VectorRows, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
    """The score in float64 of the stored numbers (not of those that they were rounded from), clipped as it must be."""
    if rows.dtype == "int8":
        values = rows.values.astype(np.float64)
        norms = np.linalg.norm(values, axis=1)
        values /= np.where(norms == 0, 1, norms)[:, None]
    else:
        values = dequantise(rows).astype(np.float64)
    return np.einsum("pd,pd->p", values[left], values[right]).clip(-1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_error_is_at_most_twice_that_of_pytorch(way: str, dtype: str, dim: int) -> None:
    rows = quantise(make_rows(50, dim), dtype)
    left, right = np.random.default_rng(1).integers(0, 50, (2, 1500))
    truth = exact(rows, left, right)
    values = torch.from_numpy(dequantise(rows))
    pytorch = (values[left] * values[right]).sum(1).clamp(-1, 1).numpy()
    # an ulp of 1 on top: where every product is exact PyTorch makes no error at all
    allowed = 2 * np.abs(pytorch - truth).max() + np.finfo(np.float32).eps
    assert np.abs(pair_score(rows, rows, left, right).score - truth).max() <= allowed


@needs_library
@settings(max_examples=60)
@given(
    dim=st.integers(1, 200),
    pairs=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    index_type=st.sampled_from((np.int32, np.int64)),
    level=st.sampled_from(LEVELS[: BEST + 1]),
    seed=st.integers(0, 1000),
    min_score=st.none() | st.floats(-1.5, 1.5),
    calibration=st.none() | st.tuples(st.floats(-20, 20), st.floats(-5, 5)),
)
def test_compiled_is_reference(
    dim: int,
    pairs: int,
    dtype: str,
    index_type: type[np.int32] | type[np.int64],
    level: str,
    seed: int,
    min_score: float | None,
    calibration: tuple[float, float] | None,
) -> None:
    left, right = (quantise(make_rows(rows, dim, seed + rows), dtype) for rows in (7, 20))
    rng = np.random.default_rng(seed)
    indices = (rng.integers(-1, 7, pairs).astype(index_type), rng.integers(-1, 20, pairs).astype(index_type))
    with pytest.MonkeyPatch.context() as patch:
        use(level, patch)
        plain = pair_score(left, right, *indices, calibration=calibration, threads=2)
        got = pair_score(left, right, *indices, calibration=calibration, min_score=min_score, threads=2)
    want = pair_score(left, right, *indices, calibration=calibration, backend="reference")
    assert plain.score.dtype == np.float32
    np.testing.assert_allclose(plain.score, want.score, rtol=0, atol=1e-6)
    assert np.array_equal(np.isnan(plain.score), (indices[0] < 0) | (indices[1] < 0))
    if calibration is not None:
        np.testing.assert_allclose(plain.probability, want.probability, rtol=0, atol=1e-5)
    if min_score is None:
        assert got.position is None
        kept = np.arange(pairs)
    else:
        kept = np.flatnonzero(plain.score >= min_score)
        np.testing.assert_array_equal(got.position, kept)
    assert got.score.tobytes() == plain.score[kept].tobytes()
    if calibration is None:
        assert got.probability is None
    else:
        assert got.probability.tobytes() == plain.probability[kept].tobytes()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 127, 128, 129, 384])
def test_bits_depend_on_nothing_but_the_two_rows(dtype: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped or shuffled, one thread or three, int32 or int64, one table or two: the same bits."""
    rows = quantise(make_rows(300, dim), dtype)
    other = VectorRows(rows.values.copy(), dtype)
    rng = np.random.default_rng(2)
    left, right = np.repeat(rng.integers(0, 300, 5000), 20), rng.integers(0, 300, 100_000)
    shuffled = rng.permutation(100_000)
    for level in LEVELS[: BEST + 1]:
        use(level, monkeypatch)
        grouped = pair_score(rows, rows, left, right, threads=1).score
        for threads in (2, 3):
            assert pair_score(rows, rows, left, right, threads=threads).score.tobytes() == grouped.tobytes()
        small = pair_score(rows, other, left.astype(np.int32), right.astype(np.int32)).score
        assert small.tobytes() == grouped.tobytes()
        mixed = pair_score(rows, rows, left[shuffled], right[shuffled], threads=2).score
        assert mixed.tobytes() == grouped[shuffled].tobytes()
        alone = pair_score(rows, rows, left[7:8], right[7:8]).score
        assert alone.tobytes() == grouped[7:8].tobytes()


@needs_library
def test_int8_bits_are_the_same_on_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = quantise(make_rows(100, 129), "int8")
    left, right = np.random.default_rng(3).integers(0, 100, (2, 5000))
    found = set()
    for level in LEVELS[: BEST + 1]:
        use(level, monkeypatch)
        found.add(pair_score(rows, rows, left, right).score.tobytes())
    assert len(found) == 1


def test_int8_row_against_itself_is_one(way: str) -> None:
    rows = quantise(make_rows(500, 384), "int8")
    same = np.arange(500)
    score = pair_score(rows, rows, same, same).score
    assert (score == 1.0).all() if way != "reference" else np.allclose(score, 1.0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_stay_within_one(way: str, dtype: str) -> None:
    rows = quantise(make_rows(500, 100), dtype)
    opposite = quantise(-dequantise(rows), dtype)
    same = np.arange(500)
    assert pair_score(rows, rows, same, same).score.max() <= 1.0
    assert pair_score(rows, opposite, same, same).score.min() >= -1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_row_scores_zero(way: str, dtype: str) -> None:
    rows = quantise(np.eye(3, dtype=np.float32) * np.float32([[1], [0], [1]]), dtype)
    score = pair_score(rows, rows, np.array([0, 1, 1]), np.array([1, 1, 0])).score
    assert score.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_int8_sums_do_not_overflow(way: str, dtype: str) -> None:
    dim = 4096
    rows = quantise(np.full((2, dim), dim**-0.5, np.float32) * np.float32([[1], [-1]]), dtype)
    score = pair_score(rows, rows, np.array([0, 0, 1]), np.array([0, 1, 1])).score
    np.testing.assert_allclose(score, [1, -1, 1], atol=1e-5)


@pytest.mark.parametrize("bad", [-2, 10, 2**31 - 1, -(2**31), 2**40, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("place", [0, 1023, 1024, 1040, 49_999])
def test_index_out_of_range_names_the_first_place(way: str, bad: int, side: str, place: int) -> None:
    rows = quantise(make_rows(10, 8), "int8")
    indices = {"left": np.zeros(50_000, np.int64), "right": np.zeros(50_000, np.int64)}
    indices[side][place] = indices["right"][49_999] = bad
    first = "left" if place == 49_999 and side == "left" else side
    for threads in (1, 2):
        with pytest.raises(IndexError, match=rf"{first}_index\[{place}\] is {bad}, outside the 10 rows"):
            pair_score(rows, rows, indices["left"], indices["right"], threads=threads)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 127, 129, 384])
def test_nothing_is_read_past_the_table(dtype: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table ends with its last row at the end of a page that no readable page follows; so do the indices."""
    table = VectorRows(guarded(quantise(make_rows(4, dim), dtype).values), dtype)
    last = guarded(np.full(200, 3))
    for level in LEVELS[: BEST + 1]:
        use(level, monkeypatch)
        assert not np.isnan(pair_score(table, table, last, last).score).any()


@needs_library
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that come poisoned leave without poison."""
    poison = np.float32(12345.0)

    def poisoned(shape: int, dtype: type[np.generic]) -> NDArray[np.generic]:
        return np.full(shape, poison).astype(dtype)

    rows = quantise(make_rows(20, 33), "int8")
    left, right = np.random.default_rng(4).integers(-1, 20, (2, 70_001))
    expected = pair_score(rows, rows, left, right, calibration=(2.0, 0.5), threads=2)
    monkeypatch.setattr(kernel.np, "empty", poisoned)
    plain = pair_score(rows, rows, left, right, calibration=(2.0, 0.5), threads=2)
    kept = pair_score(rows, rows, left, right, calibration=(2.0, 0.5), min_score=0.1, threads=2)
    assert plain.score.tobytes() == expected.score.tobytes()
    assert plain.probability.tobytes() == expected.probability.tobytes()
    assert (kept.score < poison).all()
    assert (kept.probability < poison).all()
    assert (kept.position < len(left)).all()


def test_survivors_keep_their_order_over_threads(way: str) -> None:
    rows = quantise(make_rows(100, 16), "float32")
    left, right = np.random.default_rng(5).integers(-1, 100, (2, 60_000))
    everything = pair_score(rows, rows, left, right)
    for least in (-2.0, 0.0, 0.7, 2.0):
        for threads in (1, 2, 3):
            kept = pair_score(rows, rows, left, right, min_score=least, calibration=(4.0, -1.0), threads=threads)
            want = np.flatnonzero(everything.score >= least)
            np.testing.assert_array_equal(kept.position, want)
            assert kept.score.tobytes() == everything.score[want].tobytes()
            assert len(kept.probability) == len(want)


def test_min_score_is_compared_as_the_number_it_is(way: str) -> None:
    """0.1 is no float32: its neighbour above survives, its neighbour below does not."""
    above = np.float32(0.1)
    below = np.nextafter(above, np.float32(0))
    assert float(below) < 0.1 < float(above)
    left = VectorRows(np.array([[above], [below]], np.float32), "float32")
    one = VectorRows(np.ones((1, 1), np.float32), "float32")
    kept = pair_score(left, one, np.array([0, 1]), np.array([0, 0]), min_score=0.1)
    assert kept.position.tolist() == [0]


def test_probability_is_the_sigmoid(way: str) -> None:
    rows = quantise(make_rows(50, 24), "float32")
    left, right = np.random.default_rng(6).integers(0, 50, (2, 3000))
    for slope, offset in ((1.0, 0.0), (-30.0, 4.0), (1000.0, -500.0), (0.0, -200.0)):
        got = pair_score(rows, rows, left, right, calibration=(slope, offset))
        with np.errstate(over="ignore"):
            want = 1 / (1 + np.exp(-(slope * got.score.astype(np.float64) + offset)))
        np.testing.assert_allclose(got.probability, want, rtol=0, atol=1e-4)


def test_no_pairs_and_no_rows(way: str) -> None:
    nothing = np.empty(0, np.int64)
    empty = VectorRows(np.empty((0, 5), np.int8), "int8")
    got = pair_score(empty, empty, nothing, nothing, calibration=(1.0, 0.0), min_score=0.0, threads=4)
    assert (len(got.score), len(got.probability), len(got.position)) == (0, 0, 0)
    missing = np.full(3, -1)
    assert np.isnan(pair_score(empty, empty, missing, missing).score).all()
    with pytest.raises(IndexError, match=r"left_index\[0\] is 0, outside the 0 rows"):
        pair_score(empty, empty, np.zeros(1, np.int64), np.zeros(1, np.int64))


def test_rows_and_indices_may_be_read_only_and_strided(way: str) -> None:
    rows = quantise(make_rows(30, 12), "bf16")
    rows.values.flags.writeable = False
    both = np.random.default_rng(7).integers(0, 30, (40, 2))
    both.flags.writeable = False
    got = pair_score(rows, rows, both[:, 0], both[:, 1]).score
    np.testing.assert_allclose(got, exact(rows, both[:, 0], both[:, 1]), atol=1e-6)


@pytest.mark.parametrize(
    ("left_index", "right_index", "message"),
    [
        (np.zeros(2, np.int64), np.zeros(2, np.int32), "one type and length"),
        (np.zeros(2, np.int64), np.zeros(3, np.int64), "one type and length"),
        (np.zeros(2, np.float64), np.zeros(2, np.int64), "left_index must be int32 or int64"),
        (np.zeros((2, 1), np.int64), np.zeros(2, np.int64), "left_index must be int32 or int64"),
    ],
)
def test_indices_that_do_not_fit_are_refused(
    left_index: NDArray[np.generic], right_index: NDArray[np.generic], message: str
) -> None:
    rows = quantise(make_rows(3, 4), "int8")
    with pytest.raises(ValueError, match=message):
        pair_score(rows, rows, left_index, right_index)


def test_rows_that_do_not_fit_are_refused() -> None:
    index = np.zeros(1, np.int64)
    eight = quantise(make_rows(3, 8), "int8")
    with pytest.raises(ValueError, match="left rows are int8 x 8, right rows are bf16 x 8"):
        pair_score(eight, quantise(make_rows(3, 8), "bf16"), index, index)
    with pytest.raises(ValueError, match="right rows are int8 x 9"):
        pair_score(eight, quantise(make_rows(3, 9), "int8"), index, index)
    with pytest.raises(ValueError, match="NaN"):
        pair_score(eight, eight, index, index, min_score=float("nan"))
    wide = VectorRows(np.zeros((1, kernel.MAX_INT8_DIM + 1), np.int8), "int8")
    with pytest.raises(ValueError, match="32-bit"):
        pair_score(wide, wide, index, index)


@needs_library
def test_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = quantise(make_rows(3, 4), "int8")
    monkeypatch.setenv("FLIPKD_CPU_LEVEL", "avx1024")
    with pytest.raises(KernelError, match="avx1024"):
        pair_score(rows, rows, np.zeros(1, np.int64), np.zeros(1, np.int64), backend="cpu")


def test_chunked_pytorch_peer_is_right() -> None:
    rows = torch.from_numpy(make_rows(40, 16))
    left, right = torch.from_numpy(np.random.default_rng(8).integers(0, 40, (2, 1001)))
    got = gather_multiply_sum(rows, rows, left, right, 64)
    torch.testing.assert_close(got, (rows[left] * rows[right]).sum(1))
