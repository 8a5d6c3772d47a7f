"""One table, whoever makes it: any order, split or number of workers, with deaths and interruptions."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.calibration.cluster import crew_of
from edgewise.calibration.collect import MEMORY, Progress, collect
from edgewise.calibration.data import Samples, from_arrays, from_function, open_samples
from edgewise.calibration.partial import Keeper, Origin, Partial, collect_to
from edgewise.calibration.sharding import (
    Alone,
    Answer,
    Crew,
    Death,
    Observer,
    OpenCrew,
    Positions,
    Processes,
    Task,
    observe,
)
from edgewise.calibration.table import CalibrationTable
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import input_specs

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[N, 3, 8, 8] x) => (float[N, 4, 1, 1] y)
<float[4, 3, 3, 3] w = {WEIGHT}>
{
    c = Conv <pads = [1, 1, 1, 1]> (x, w)
    r = Relu (c)
    y = GlobalAveragePool (r)
}""".replace("WEIGHT", ", ".join(str(n % 7 - 3) for n in range(108)))
VALUES = ("x", "c", "r", "y")
COUNT = 12


def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


def samples(count: int = COUNT, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    return from_arrays({"x": rng.standard_normal((count, 3, 8, 8)).astype(np.float32)}, input_specs(model()))


def task(given: Samples | None = None, values: tuple[str, ...] = VALUES) -> Task:
    return Task(model(), given or samples(), values, threads=1, memory=MEMORY)


def serial() -> CalibrationTable:
    return collect(model(), samples(), VALUES)


class Moody:
    """A crew that gives portions back in an order of its own, half done, or dies over them."""

    def __init__(self, task: Task, size: int, draw: st.DataObject, deaths: int = 0) -> None:
        self.size = size
        self._task, self._draw, self._deaths = task, draw, deaths
        self._given: dict[int, Positions] = {}

    def send(self, worker: int, positions: Positions) -> None:
        assert worker not in self._given
        self._given[worker] = positions

    def receive(self) -> tuple[int, Answer]:
        worker = self._draw.draw(st.sampled_from(sorted(self._given)))
        positions = self._given.pop(worker)
        if self._deaths and self._draw.draw(st.booleans()):
            self._deaths -= 1
            return worker, Death("a mood")
        done = positions[: self._draw.draw(st.integers(1, positions.size))]
        return worker, collect(self._task.model, self._task.samples.take(done), VALUES, threads=1)

    def close(self) -> None: ...


class Observers:
    """Two workers that are no processes; what they are made of and answer is sent to them all the same."""

    size = 2

    def __init__(self, task: Task, _: Progress) -> None:
        self._workers = [Observer(task.shared_by(self.size).packed()) for _ in range(self.size)]
        self._given: dict[int, Positions] = {}

    def send(self, worker: int, positions: Positions) -> None:
        self._given[worker] = positions

    def receive(self) -> tuple[int, Answer]:
        worker, positions = self._given.popitem()
        return worker, self.answer(worker, positions)

    def answer(self, worker: int, positions: Positions) -> Answer:
        answer: Answer = pickle.loads(pickle.dumps(self._workers[worker].answer(positions)))
        return answer

    def close(self) -> None: ...


class Mortals(Observers):
    """Whoever is to observe the tenth sample dies."""

    def answer(self, worker: int, positions: Positions) -> Answer:
        return Death("a sample") if 9 in positions else super().answer(worker, positions)


@settings(deadline=None, max_examples=12)
@given(st.data(), st.integers(1, 4), st.integers(0, 2), st.permutations(range(COUNT)))
def test_order_split_workers_and_deaths_do_not_show(
    data: st.DataObject, size: int, deaths: int, order: list[int]
) -> None:
    shuffled = task(samples().take(order))
    keeper = Keeper(None, Origin.of(shuffled.model, VALUES, shuffled.samples), COUNT, 0.0, None)
    observe(Moody(shuffled, size, data, deaths), keeper.partial.todo, keeper.absorb)
    assert keeper.partial.done.all()
    assert keeper.partial.table is not None
    assert keeper.partial.table.digest == serial().digest


@pytest.mark.parametrize(
    ("source", "crew"), [("arrays", Observers), ("random", Observers), ("file", crew_of(2))]
)
def test_workers_make_the_serial_table(source: str, crew: OpenCrew, tmp_path: Path) -> None:
    if source == "file":
        np.savez(tmp_path / "x.npz", x=np.concatenate([feed["x"] for feed in samples()]))
        given = open_samples(str(tmp_path / "x.npz"), input_specs(model()))
    else:
        given = samples() if source == "arrays" else open_samples("random:5", input_specs(model()))
    heard: list[int] = []
    table, notes = collect_to(tmp_path / "t.npz", task(given), crew, progress=heard.append)
    assert table.digest == collect(model(), given, VALUES).digest
    assert CalibrationTable.load(tmp_path / "t.npz") == table
    assert not notes
    assert heard == sorted(heard)
    assert heard[-1] == len(given)
    assert {path.name for path in tmp_path.iterdir()} <= {"t.npz", "x.npz"}


def deadly(folder: Path, deaths: int, monkeypatch: pytest.MonkeyPatch) -> Samples:
    """Samples whose tenth kills the process that reads it, unless that is this one, so many times."""
    (folder / "deadly_samples.py").write_text(
        textwrap.dedent(f"""
        import os, pathlib, signal
        import numpy as np

        def read():
            rng = np.random.default_rng(0)
            rows = rng.standard_normal(({COUNT}, 3, 8, 8)).astype(np.float32)
            for i, row in enumerate(rows):
                mark = pathlib.Path({str(folder)!r}, "deaths")
                died = len(mark.read_text()) if mark.exists() else 0
                if i == 9 and died < {deaths} and os.getpid() != {os.getpid()}:
                    mark.write_text("x" * (died + 1))
                    os.kill(os.getpid(), signal.SIGKILL)
                yield {{"x": row[None]}}
        """)
    )
    monkeypatch.syspath_prepend(str(folder))
    return open_samples("deadly_samples:read", input_specs(model()))


def test_a_process_that_dies_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = deadly(tmp_path, 1, monkeypatch)
    table, _ = collect_to(tmp_path / "t.npz", task(given), lambda task, _: Processes(task, 1))
    assert table.digest == serial().digest
    assert (tmp_path / "deaths").read_text() == "x"


def test_workers_that_keep_dying_are_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    with pytest.raises(EdgewiseError, match=r"worker \d died \(a sample.*of 3 that did on samples \d+ to"):
        collect_to(tmp_path / "t.npz", task(), Mortals)
    kept = Partial.load(tmp_path / "t.npz.part")
    assert 0 < kept.done.sum() < COUNT
    table, notes = collect_to(tmp_path / "t.npz", task(), Observers)
    assert table.digest == serial().digest
    assert notes == (f"went on from {tmp_path / 't.npz.part'}: it held {kept.done.sum()} of 12 samples",)


def test_what_is_wrong_with_a_sample_is_told_by_the_worker(tmp_path: Path) -> None:
    rows = np.ones((COUNT, 3, 8, 8), np.float32)
    rows[7, 0, 0, 0] = np.nan
    np.savez(tmp_path / "x.npz", x=rows)
    given = open_samples(str(tmp_path / "x.npz"), input_specs(model()))
    for crew in (Alone, Observers):
        with pytest.raises(InputError, match="sample 7: input 'x' holds NaN"):
            collect_to(tmp_path / "t.npz", task(given), crew)


def test_samples_that_cannot_be_sent_are_refused(tmp_path: Path) -> None:
    given = from_function(lambda: [{"x": np.ones((4, 3, 8, 8), np.float32)}], input_specs(model()), "local")
    with pytest.raises(InputError, match="cannot be sent to workers"):
        collect_to(tmp_path / "t.npz", task(given), crew_of(2))


def test_memory_and_threads_are_shared() -> None:
    one = Task(model(), samples(), VALUES, threads=4, memory=1000).shared_by(3)
    assert (one.threads, one.memory) == (1, 333)


class Interrupted(Alone):
    """It answers for a few samples at a time, and an interrupt comes after two answers."""

    answers = 0

    def send(self, worker: int, positions: Positions) -> None:
        super().send(worker, positions[:5])

    def receive(self) -> tuple[int, Answer]:
        self.answers += 1
        if self.answers == 3:
            raise KeyboardInterrupt
        return super().receive()


def interrupted(output: Path, given: Task, crew: type[Crew] = Interrupted) -> Path:
    with pytest.raises(KeyboardInterrupt):
        collect_to(output, given, crew)
    return output.with_name(f"{output.name}.part")


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "t.npz"
    part = interrupted(output, task())
    assert not output.exists()
    heard: list[int] = []
    table, notes = collect_to(output, task(), progress=heard.append)
    assert table.digest == serial().digest
    assert notes == (f"went on from {part}: it held 10 of 12 samples",)
    assert heard[0] == 11
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]
    assert output.read_bytes() == serial().save(tmp_path / "serial").read_bytes()


def test_another_crew_may_go_on(tmp_path: Path) -> None:
    interrupted(tmp_path / "t.npz", task())
    assert collect_to(tmp_path / "t.npz", task(), Observers)[0].digest == serial().digest


def test_what_is_stale_is_not_used(tmp_path: Path) -> None:
    output = tmp_path / "t.npz"
    other = ir.from_proto(onnx.parser.parse_model(TEXT.replace("pads = [1, 1, 1, 1]", "pads = [2, 2, 2, 2]")))
    stale = {
        "another model": Task(other, samples(), VALUES, 1, MEMORY),
        "other samples": task(samples(seed=1)),
        "other values": task(values=("x", "c")),
    }
    for text, old in stale.items():
        part = interrupted(output, old)
        table, notes = collect_to(output, task())
        assert table.digest == serial().digest
        assert notes == (f"started over: {part} is of {text}",)


def test_what_is_damaged_is_not_used(tmp_path: Path) -> None:
    output = tmp_path / "t.npz"
    part = interrupted(output, task())
    whole = part.read_bytes()
    for data, text in ((whole[: len(whole) // 2], "damaged"), (serial().save(part).read_bytes(), "no part")):
        part.write_bytes(data)
        table, notes = collect_to(output, task())
        assert table.digest == serial().digest
        assert notes[0].startswith("started over: ")
        assert text in notes[0]


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own, killed in the middle; samples come slowly and are written down at once."""
    (tmp_path / "net.onnx").write_bytes(onnx.parser.parse_model(TEXT).SerializeToString())
    (tmp_path / "slow_run.py").write_text(
        textwrap.dedent(f"""
        import time
        from pathlib import Path
        import numpy as np, onnx_ir as ir
        from edgewise.calibration.data import from_function
        from edgewise.calibration.partial import collect_to
        from edgewise.calibration.sharding import Task
        from edgewise.runtime.evaluate import input_specs

        def collect(pause):
            def read():
                for row in np.random.default_rng(0).standard_normal(({COUNT}, 3, 8, 8)).astype(np.float32):
                    time.sleep(pause)
                    yield {{"x": row[None]}}

            model = ir.load("net.onnx")
            task = Task(model, from_function(read, input_specs(model), "slow"), {VALUES!r}, 1, 1 << 30)
            return collect_to(Path("t.npz"), task, every=0.0)
        """)
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "import slow_run; slow_run.collect(0.05)"], cwd=tmp_path
    )
    part = tmp_path / "t.npz.part"
    while not part.exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < Partial.load(part).done.sum() < COUNT
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    table, (note,) = importlib.import_module("slow_run").collect(0)
    assert note.startswith("went on from t.npz.part")
    assert table.digest == serial().digest
    assert not part.exists()


def test_ray_makes_the_serial_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)  # for the actors, which import what they are sent
    given = deadly(tmp_path, 1, monkeypatch)
    table, _ = collect_to(tmp_path / "t.npz", task(given), crew_of(2, "local"))
    assert table.digest == serial().digest
    assert (tmp_path / "deaths").read_text() == "x"


def test_ray_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EdgewiseError, match=r"pip install 'edgewise\[ray\]'"):
        collect_to(tmp_path / "t.npz", task(), crew_of(2, "local"))


def test_a_worker_that_dies_idle_is_noticed(tmp_path: Path) -> None:
    crew = Processes(task(), 1)
    try:
        process, _ = crew._workers[0]
        process.kill()
        process.join()
        crew.send(0, np.arange(3))
        _, death = crew.receive()
        assert isinstance(death, Death)
        assert death.why.startswith("killed")
        crew.send(0, np.arange(3))
        assert crew.receive()[1] == collect(model(), samples().take(range(3)), VALUES)
    finally:
        crew.close()
