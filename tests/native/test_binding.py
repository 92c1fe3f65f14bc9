"""Bound arrays: parts of them from run to run, in place where the graph writes to an input, refusals, and nothing that grows."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper

from server.errors import InvalidTensor, UnderstudyError
from server.runtime.sessions import Session, Sessions, SessionSettings, _PythonSession
from tests.runtime import graphs_for_tests as graphs


def adder(path: Path) -> Path:
    """s = a + b, d = a - b."""
    nodes = [helper.make_node("Add", ["a", "b"], ["s"]), helper.make_node("Sub", ["a", "b"], ["d"])]
    kind = TensorProto.FLOAT
    return graphs.write(
        path,
        nodes,
        [graphs.value("a", kind, ["N", "M"]), graphs.value("b", kind, ["N", "M"])],
        [graphs.value("s", kind, ["N", "M"]), graphs.value("d", kind, ["N", "M"])],
        {},
    )


@pytest.fixture(params=["native", "python"])
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Session:
    path = adder(tmp_path / "m.onnx")
    return Sessions().open(path) if request.param == "native" else _PythonSession(SessionSettings(threads=1), path)


def test_parts_of_the_arrays_run_with_any_shape(session: Session) -> None:
    a, b, out = (np.zeros(64, np.float32) for _ in range(3))
    bound = session.bind([a, b], {"d": out})
    random = np.random.default_rng(0)
    for shape in ((2, 3), (1, 64), (8, 8), (0, 5), (4, 1)):
        size = shape[0] * shape[1]
        a[:], b[:], out[:] = random.standard_normal(64), random.standard_normal(64), 7
        for place in range(3):
            bound.shape(place, shape)
        bound.run()
        assert np.array_equal(out[:size], a[:size] - b[:size]) and (out[size:] == 7).all()


def test_another_array_takes_a_place(session: Session) -> None:
    a, b, out = np.ones((2, 2), np.float32), np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)
    bound = session.bind([a, b], {"s": out})
    bound.put(1, np.full((2, 2), 5, np.float32))
    bound.run()
    assert (out == 6).all()


def test_what_does_not_fit_is_refused(session: Session) -> None:
    a, b, out = np.ones((2, 2), np.float32), np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)
    bound = session.bind([a, b], {"s": out})
    with pytest.raises(ValueError, match="more than the array holds"):
        bound.shape(0, (2, 3))
    bound.shape(0, (4, 1))
    bound.shape(1, (3, 1))
    with pytest.raises(UnderstudyError):
        bound.run()
    bound.shape(0, (2, 2))
    bound.shape(1, (2, 2))
    bound.run()
    assert (out == 2).all()


def test_wrong_types_and_sizes_are_refused_by_the_c_api(tmp_path: Path) -> None:
    session = Sessions().open(adder(tmp_path / "m.onnx"))
    good = np.ones((2, 2), np.float32)
    for inputs in ([good], [good, good.astype(np.float64)], [good, np.ones((4, 4), np.float32)[:, ::2]]):
        with pytest.raises(InvalidTensor):
            session.bind(inputs, {"s": good.copy()})
    bound = session.bind([good, good], {"s": good.copy()})
    for place, sizes in ((0, (-1, 2)), (0, (2**40, 2**40)), (9, (1, 1)), (-1, (1, 1)), (0, (1,) * 40)):
        with pytest.raises(ValueError):
            bound.shape(place, sizes)
    session.close()
    with pytest.raises(InvalidTensor, match="closed"):
        bound.run()


def test_a_kept_binding_does_not_grow(tmp_path: Path) -> None:
    session = Sessions().open(adder(tmp_path / "m.onnx"))
    a, b, out = (np.ones(1024, np.float32) for _ in range(3))
    bound = session.bind([a, b], {"s": out})

    def rounds() -> None:
        for i in range(20_000):
            for place in range(3):
                bound.shape(place, (1 + i % 32, 32))
            bound.run()

    rounds()
    gc.collect()
    before = psutil.Process().memory_info().rss
    rounds()
    assert psutil.Process().memory_info().rss - before < 2 << 20
