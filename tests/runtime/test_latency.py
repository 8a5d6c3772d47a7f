"""Real processes measure small models; no test looks at how fast anything is."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import psutil
import pytest

from edgewise.runtime import rounds
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import InputError
from edgewise.runtime.isolated import IsolatedModel, WorkerFailed
from edgewise.runtime.latency import LatencyReport, measure
from edgewise.runtime.machine import cores_for
from edgewise.runtime.session import PROVIDERS, Grant, ProviderError, import_onnxruntime
from edgewise.runtime.worker import resident_bytes, warm_up

ONE = Conditions(threads=1)
QUICK = {"max_seconds": 0.1, "conditions": ONE}  # one launch of two rounds
GOOD = "g (float[1, 4] x) => (float[1, 4] y) { y = Relu(x) }"
ENDLESS = """g (float[1, 4] x) => (float[1, 4] y) <int64 n = {9000000000000000000}, bool on = {1}> {
    y = Loop (n, on, x) <body = b (int64 i, bool c, float[1, 4] a) => (bool d, float[1, 4] z) {
        d = Identity(c) z = Relu(a)
    }>
}"""
HUGE = "g (float[1] x) => (float[N] y) <int64[1] n = {4398046511104}> { y = Expand(x, n) }"
SEQUENCE = "g (seq(float[N]) s) => (float[N] y) <int64 i = {0}> { y = SequenceAt(s, i) }"
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="this system does not tell, or does not offer it")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Whatever a test measures, no process and no temporary file is left of it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert workers() == []
    assert list(folder.iterdir()) == []


def workers() -> list[psutil.Process]:
    """The worker processes alive, in the order of their start."""
    mine = [p for p in psutil.Process().children() if "edgewise.runtime.worker" in p.cmdline()]
    return sorted(mine, key=lambda p: p.pid)


def save(folder: Path, graph: str, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}'), path)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return save(tmp_path, GOOD, "good.onnx")


def cause(report: LatencyReport, name: str) -> str:
    """Why the model failed."""
    (model,) = [m for m in report.models if m.name == name]
    assert model.failed is not None
    assert math.isnan(model.median_ms)
    assert "\n" not in model.failed
    return model.failed


class TestReport:
    def test_of_two_models(self, good: Path, tmp_path: Path) -> None:
        other = save(tmp_path, "g (float[1, 4] x) => (float[1, 4] y) { z = Exp(x) y = Relu(z) }")
        shares: list[float] = []
        report = measure({"one": good, "two": other}, progress=shares.append, **QUICK)
        assert [m.name for m in report.models] == ["one", "two"]
        for model, path in zip(report.models, (good, other), strict=True):
            assert model.path == str(path)
            assert model.file_bytes == path.stat().st_size
            assert 0 < model.min_ms <= model.low_ms <= model.median_ms <= model.high_ms
            assert model.median_ms <= model.p90_ms <= model.p99_ms
            assert model.runs > 0
            assert model.quantiles_ms[0] == model.min_ms
            assert model.quantiles_ms[90] == pytest.approx(model.p90_ms)
            assert len(model.quantiles_ms) == 101
            assert model.per_second == pytest.approx(1e3 / model.median_ms)
            assert model.grant == Grant("cpu", {"CPUExecutionProvider": 1 + (model.name == "two")}, {})
            assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
            assert 0 < model.loaded_mb <= model.peak_mb
            assert model.load_ms > 0
            assert model.first_ms > 0
        (ratio,) = report.ratios
        assert (ratio.name, ratio.baseline) == ("two", "one")
        assert ratio.low < ratio.speedup < ratio.high
        assert report.noise_floor is not None
        assert report.launches == 1
        assert report.stopped_because == "time spent"
        assert report.inputs == "x float32[1, 4] (random, seed 0)"
        assert report.conditions == ONE.pinned()
        assert shares == sorted(shares)
        assert shares[-1] == 1.0

    def test_survives_json(self, good: Path, tmp_path: Path) -> None:
        report = measure({"good": good, "no": tmp_path / "no.onnx"}, self_check=False, **QUICK)
        assert LatencyReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report

    def test_of_one_model(self, good: Path) -> None:
        report = measure({"good": good}, **QUICK)
        assert report.ratios == ()
        assert report.noise_floor is None

    def test_without_the_self_check(self, good: Path) -> None:
        report = measure({"one": good, "two": good}, self_check=False, **QUICK)
        assert len(report.ratios) == 1
        assert report.noise_floor is None

    def test_stops_when_it_knows_enough(self, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rounds, "_LAUNCH_SECONDS", 0.0)
        models = {"one": good, "two": good}
        report = measure(models, precision=1e6, max_seconds=60.0, conditions=ONE, self_check=False)
        assert report.stopped_because == "precision reached"
        assert report.launches == 3  # fewer would leave the variance of the launches a guess

    def test_files_beside_the_model_count(self, tmp_path: Path) -> None:
        model = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]>' + GOOD.replace("Relu(x)", "Add(x, w)")
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4096, np.float32)[:4], "w"))
        path = tmp_path / "outside.onnx"
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        expected = path.stat().st_size + (tmp_path / "weights.bin").stat().st_size
        assert measure({"outside": path}, **QUICK).models[0].file_bytes == expected


class TestInputs:
    def test_a_feed_is_passed_on(self, good: Path) -> None:
        report = measure({"good": good}, feed={"x": np.ones((1, 4), np.float32)}, **QUICK)
        assert report.models[0].failed is None
        assert report.inputs == "x float32[1, 4]"

    def test_a_feed_that_does_not_fit_is_a_failure(self, good: Path) -> None:
        report = measure({"good": good}, feed={"z": np.ones((1, 4), np.float32)}, **QUICK)
        assert cause(report, "good") == "it takes x and was given z"

    def test_of_a_wrong_shape_is_a_failure(self, good: Path) -> None:
        report = measure({"good": good}, feed={"x": np.ones((1, 5), np.float32)}, **QUICK)
        assert "does not run on these inputs" in cause(report, "good")

    def test_of_each_models_own(self, good: Path, tmp_path: Path) -> None:
        other = save(tmp_path, GOOD.replace("x", "z"), "other.onnx")
        feeds = {"other": {"z": np.ones((1, 4), np.float32)}}
        report = measure(
            {"good": good, "other": other}, feed={"x": feeds["other"]["z"]}, feeds=feeds, **QUICK
        )
        assert report.inputs == "x float32[1, 4]; z float32[1, 4]"

    def test_dynamic_dimensions_are_one(self, tmp_path: Path) -> None:
        path = save(tmp_path, "g (float[batch, 4] x) => (float[batch, 4] y) { y = Relu(x) }")
        assert measure({"m": path}, **QUICK).inputs == "x float32[1, 4] (random, seed 0)"

    @pytest.mark.parametrize(
        "graph",
        [
            "g (string[2] x) => (string[2] y) { y = Identity(x) }",
            "g (float[2] file, bool[2] arr_0) => (float[2] y) { y = Where(arr_0, file, file) }",
            "g (float16[2] x, int64 n) => (float16[2] y) { z = Cast<to = 10>(n) y = Add(x, z) }",
        ],
    )
    def test_every_plain_type_and_name(self, tmp_path: Path, graph: str) -> None:
        assert measure({"m": save(tmp_path, graph)}, **QUICK).models[0].failed is None

    def test_names_that_are_no_file_names(self, tmp_path: Path) -> None:
        model = onnx.load(save(tmp_path, GOOD))
        model.graph.input[0].name = model.graph.node[0].input[0] = "../x:0"
        path = tmp_path / "named.onnx"
        onnx.save(model, path)
        assert measure({"m": path}, **QUICK).models[0].failed is None

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"models": {}}, "no model"),
            ({"precision": 0.0}, "precision"),
            ({"max_seconds": -1.0}, "max_seconds"),
            ({"timeout": math.nan}, "timeout"),
            ({"conditions": Conditions("abacus")}, "abacus"),
            ({"conditions": Conditions(cores=(4096,))}, "core 4096"),
        ],
    )
    def test_arguments_without_sense(self, good: Path, arguments: dict[str, Any], text: str) -> None:
        with pytest.raises(InputError, match=text):
            measure(**{"models": {"good": good}, **arguments})

    def test_a_provider_that_is_not_here(self, good: Path) -> None:
        here = import_onnxruntime().get_available_providers()
        absent = next(short for short, (name, _) in PROVIDERS.items() if name not in here)
        with pytest.raises(ProviderError, match="pip install"):
            measure({"good": good}, conditions=Conditions(absent))


class TestConditions:
    def test_several_runs_at_once_are_a_throughput(self, good: Path) -> None:
        conditions = Conditions(threads=1, concurrency=3, batch=5)
        (model,) = measure({"good": good}, max_seconds=0.1, conditions=conditions).models
        assert model.per_second > 0
        assert model.per_second != pytest.approx(
            5e3 / model.median_ms, rel=1e-9
        )  # it is counted, not implied

    @pytest.mark.parametrize("bound", [False, True])
    def test_values_bound_to_the_device(self, good: Path, bound: bool) -> None:
        conditions = Conditions(threads=1, io_binding=bound)
        assert measure({"good": good}, max_seconds=0.1, conditions=conditions).models[0].failed is None

    def test_text_is_never_bound(self, tmp_path: Path) -> None:
        path = save(tmp_path, "g (string[2] x) => (string[2] y) { y = Identity(x) }")
        conditions = Conditions(io_binding=True)
        assert measure({"m": path}, max_seconds=0.1, conditions=conditions).models[0].failed is None

    def test_a_part_of_the_nodes_is_not_enough_for_the_strict(
        self, good: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A CPU build grants everything, so the record is changed on its way from the worker."""
        ask = IsolatedModel.ask

        def partly(self: IsolatedModel, command: str, **arguments: Any) -> dict[str, Any]:
            reply = ask(self, command, **arguments)
            if command == "open":
                reply["grant"] = {"provider": "cuda", "assigned": {"A": 7, "B": 2}, "elsewhere": {"Shape": 2}}
            return reply

        monkeypatch.setattr(IsolatedModel, "ask", partly)
        report = measure({"good": good}, **QUICK)
        assert report.models[0].failed is None
        assert report.models[0].grant == Grant("cuda", {"A": 7, "B": 2}, {"Shape": 2})
        strict = measure({"good": good}, max_seconds=0.1, conditions=Conditions(strict=True))
        assert "7 of 9 nodes" in cause(strict, "good")
        assert "Shape 2" in cause(strict, "good")


class TestFailures:
    def test_are_reported_and_the_others_measured(self, good: Path, tmp_path: Path) -> None:
        (tmp_path / "junk.onnx").write_bytes(b"junk" * 100)
        foreign = GOOD.replace("Relu", "my.ops.Foo")
        models = {
            "good": good,
            "missing": tmp_path / "missing.onnx",
            "junk": tmp_path / "junk.onnx",
            "huge": save(tmp_path, HUGE, "huge.onnx"),
            "sequence": save(tmp_path, SEQUENCE, "sequence.onnx"),
            "foreign": tmp_path / "foreign.onnx",
            "other": good,
        }
        header = '<ir_version: 8, opset_import: ["": 17, "my.ops": 1]>'
        onnx.save(onnx.parser.parse_model(header + foreign), models["foreign"])
        report = measure(models, **QUICK)
        assert "exist" in cause(report, "missing")
        assert "Protobuf" in cause(report, "junk")
        assert "memory" in cause(report, "huge")
        assert "'s' is seq(tensor(float))" in cause(report, "sequence")
        assert "my.ops:Foo" in cause(report, "foreign")
        assert [r.name for r in report.ratios] == ["other"]
        assert report.models[0].failed is None

    def test_of_the_first_model_leaves_no_ratios(self, good: Path, tmp_path: Path) -> None:
        report = measure({"missing": tmp_path / "missing.onnx", "good": good}, **QUICK)
        assert report.ratios == ()
        assert report.noise_floor is None
        assert [m.failed is None for m in report.models] == [False, True]

    def test_of_all_models(self, tmp_path: Path) -> None:
        report = measure({"missing": tmp_path / "missing.onnx"}, **QUICK)
        assert report.stopped_because == "every model failed"

    def test_a_model_that_hangs(self, good: Path, tmp_path: Path) -> None:
        models = {"good": good, "endless": save(tmp_path, ENDLESS)}
        report = measure(models, timeout=4.0, self_check=False, **QUICK)
        assert "no answer within 4 s" in cause(report, "endless")
        assert report.models[0].failed is None

    @POSIX
    def test_a_model_that_crashes_onnxruntime(self, good: Path) -> None:
        def crash(share: float) -> None:
            if len(now := workers()) == 2:
                now[1].send_signal(signal.SIGSEGV)

        report = measure({"one": good, "two": good}, progress=crash, self_check=False, **QUICK)
        assert "SIGSEGV" in cause(report, "two")
        assert report.models[0].failed is None
        assert report.ratios == ()


class TestInterruption:
    def test_ends_the_processes(self, good: Path) -> None:
        """The fixture sees that no process and no file is left."""

        def interrupt(share: float) -> None:
            assert workers()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure({"one": good, "two": good}, progress=interrupt, self_check=False, **QUICK)

    @LINUX
    def test_processes_do_not_outlive_a_parent_that_is_killed(self, tmp_path: Path) -> None:
        program = textwrap.dedent("""
            import os, pathlib, psutil, sys
            from edgewise.runtime.isolated import IsolatedModel
            model = IsolatedModel(pathlib.Path(sys.argv[1]), threads=1, timeout=60)
            model.wait_until_ready()
            print(psutil.Process().children()[0].pid, flush=True)
            os.kill(os.getpid(), 9)
        """)
        command = [sys.executable, "-c", program, str(tmp_path / "log")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL
        try:
            left = psutil.Process(int(done.stdout))
        except psutil.NoSuchProcess:
            return
        gone, _ = psutil.wait_procs([left], timeout=10)
        assert gone or left.status() == psutil.STATUS_ZOMBIE


class TestIsolatedModel:
    def opened(self, model: IsolatedModel, path: Path, cores: tuple[int, ...] = ()) -> None:
        model.wait_until_ready()
        conditions = Conditions(threads=1, cores=cores)
        model.ask("open", model=str(path), **conditions.to_dict())

    @POSIX
    def test_is_at_rest_when_it_is_not_asked(self, good: Path, tmp_path: Path) -> None:
        with IsolatedModel(tmp_path / "log", threads=1, timeout=60) as model:
            self.opened(model, good)
            (process,) = workers()
            deadline = time.monotonic() + 10  # a signal takes a moment to arrive
            while (status := process.status()) != psutil.STATUS_STOPPED and time.monotonic() < deadline:
                time.sleep(0.01)
        assert status == psutil.STATUS_STOPPED

    @LINUX
    def test_is_pinned(self, good: Path, tmp_path: Path) -> None:
        with IsolatedModel(tmp_path / "log", threads=1, timeout=60) as model:
            self.opened(model, good, cores_for(1))
            (process,) = workers()
            assert tuple(process.cpu_affinity()) == cores_for(1)

    def test_answers_block_by_block(self, good: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "feed.npz", np.ones((1, 4), np.float32))
        with IsolatedModel(tmp_path / "log", threads=None, timeout=60) as model:
            self.opened(model, good)
            model.ask("start", feed=str(tmp_path / "feed.npz"), inputs=["x"])
            for count in (1, 7):
                assert len(model.ask("block", lead=2, count=count)["times"]) == count

    def test_says_why_it_is_gone(self, tmp_path: Path) -> None:
        with IsolatedModel(tmp_path / "log", threads=1, timeout=60) as model:
            model.wait_until_ready()
            with pytest.raises(WorkerFailed, match="exit code 1: KeyError: 'dance'"):
                model.ask("dance")
            with pytest.raises(WorkerFailed, match="exit code 1"):
                model.ask("open")

    def test_output_of_the_model_does_not_disturb(self, good: Path, tmp_path: Path) -> None:
        """Threads of any kind may print; what is no answer goes to the log."""
        program = "import os; os.write(1, b'noise'); from edgewise.runtime.worker import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program], input="", capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout == 'noise{"ready": true}\n'


class TestCallers:
    """Processes are started afresh: nothing of the caller's main module runs again."""

    def run(self, *arguments: str, text: str = "") -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    def test_an_interactive_session(self, good: Path) -> None:
        text = f"""from edgewise.runtime.latency import measure
print(measure({{"a": {str(good)!r}}}, max_seconds=0.1).models[0].failed)
"""
        assert "None" in self.run("-i", "-q", text=text)

    def test_a_script_without_a_main_guard(self, good: Path, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(f"""print("started")
from edgewise.runtime.latency import measure
measure({{"a": {str(good)!r}}}, max_seconds=0.1)
""")
        assert self.run(str(script)) == "started\n"

    def test_a_thread(self, good: Path) -> None:
        reports: list[LatencyReport] = []
        thread = threading.Thread(target=lambda: reports.append(measure({"good": good}, **QUICK)))
        thread.start()
        thread.join(60)
        assert reports[0].models[0].failed is None


class Clock:
    """Time that passes only while the model runs."""

    def __init__(self, seconds: list[float]) -> None:
        self.now, self.runs, self._seconds = 0.0, 0, seconds

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += self._seconds[min(self.runs, len(self._seconds) - 1)]
        self.runs += 1


class TestBlocks:
    def players(self, *steady: float) -> list[rounds._Player]:
        nobody: Any = None
        players = [rounds._Player(rounds.Record(Path()), nobody, seconds) for seconds in steady]
        rounds._set_counts(players)
        return players

    @pytest.mark.parametrize(
        ("steady", "count"),
        [((0.002, 0.002), 5), ((0.0019, 0.0021), 5), ((1e-4, 1e-4), 99), ((1e-4, 0.5), 1), ((2.0,), 1)],
    )
    def test_are_of_as_many_runs_for_all(self, steady: tuple[float, ...], count: int) -> None:
        assert {player.count for player in self.players(*steady)} == {count}

    def test_fill_the_caches_first(self) -> None:
        assert [player.lead for player in self.players(1e-4, 0.01, 0.2)] == [60, 1, 0]


class TestWarmUp:
    def test_lasts_while_runs_get_faster(self) -> None:
        falling = [0.01 * 0.9**i for i in range(30)]
        clock = Clock([*falling, falling[-1]])
        assert warm_up(clock.run, clock) == pytest.approx(falling[-1])
        assert clock.runs > 30

    def test_is_short_for_a_steady_model(self) -> None:
        clock = Clock([0.01])
        assert warm_up(clock.run, clock) == pytest.approx(0.01)
        assert clock.runs == 9  # a window, and two more that are no faster

    def test_ends_though_the_model_is_never_steady(self) -> None:
        clock = Clock([0.9**i + 0.05 for i in range(200)])
        warm_up(clock.run, clock)
        assert clock.now < 12


def test_peak_memory_is_the_workers_own() -> None:
    """A process that is started by a large one must not count the large one's memory."""
    ballast = np.ones(2**26)  # half a gigabyte
    program = "from edgewise.runtime.worker import resident_bytes; print(resident_bytes()[1])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < ballast.nbytes < resident_bytes()[0] <= resident_bytes()[1]
