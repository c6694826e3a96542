"""An artefact of an encoder that was not finished: what was there before stays, and the same command goes on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import EvaluationFailed, QuantizationFailed
from cluster.model_directory import read_model_directory
from cluster.storage import LocalStorage
from cluster.unfinished import whole_directory
from jobs import quantize_encoder as job
from jobs.quantization.encoder_scorer import EncoderScorer
from tests.encoder_models import save_encoder

SCHEME = "int8_weight_only"
TEXTS = ["the cat sat on a mat", "red hats"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process would measure is read in this one, and quantising is copying."""

    def measure(directory: Path, scheme: str, rows: Any, labels: Any, threads: int) -> Any:
        return {"bytes": 1.0, "batch_s": 1.0, "timings": 1}, EncoderScorer(directory, scheme, 1).outputs(rows).double()

    def copy(model: str, into: Path) -> dict[str, str]:
        shutil.copytree(model, into, dirs_exist_ok=True)
        return {}

    monkeypatch.setattr(job, "_measure_elsewhere", measure)
    monkeypatch.setattr(job, "_maker", lambda scheme: copy)


@pytest.mark.parametrize("error", [KeyboardInterrupt, EvaluationFailed, QuantizationFailed])
def test_unfinished_artefact_leaves_what_was_there_and_the_same_command_goes_on(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    save_encoder(tmp_path / "m")
    made, command = tmp_path / "made", (str(tmp_path / "m"), tmp_path / "made", [SCHEME], TEXTS)

    def fail(*args: Any, **more: Any) -> Any:
        raise error("it was not to be")

    def fail_to_measure_artefacts(directory: Path, scheme: str, *args: Any) -> Any:
        return measure(directory, scheme, *args) if scheme == "float" else fail()

    measure = job._measure_elsewhere
    place, instead = {
        KeyboardInterrupt: ("cluster.published.write_manifest", fail),
        EvaluationFailed: ("jobs.quantize_encoder._measure_elsewhere", fail_to_measure_artefacts),
        QuantizationFailed: ("jobs.quantize.check_reload", fail),
    }[error]
    for left in ([], [SCHEME]):  # at first nothing is there, then an artefact that is good
        with monkeypatch.context() as patch:
            patch.setattr(place, instead)
            with pytest.raises(error):
                job.quantize_encoder(*command)
        assert [path.name for path in made.glob("*") if path.is_dir()] == left
        if left:
            assert read_model_directory(str(made / SCHEME)).verified
        job.quantize_encoder(*command)
        assert read_model_directory(str(made / SCHEME)).verified
        assert {path.name for path in made.iterdir()} == {SCHEME, "report.html"}


def test_whole_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "into" / "a"
    for content in ("old", "new"):
        with whole_directory(path) as partial:
            (partial / content).write_text(content)
        assert [item.name for item in path.iterdir()] == [content]
        assert path.stat().st_mode & 0o777 == 0o755


def test_whole_directory_that_cannot_be_renamed_leaves_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if target == tmp_path / "a" and any(item.name == "new" for item in self.iterdir()):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "a") as partial:
        (partial / "new").write_text("new")
    assert [item.relative_to(tmp_path).as_posix() for item in tmp_path.rglob("*")] == ["a", "a/old"]


def test_sweep_removes_the_directories_of_a_killed_process_alone(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom cluster.unfinished import whole_directory\n"
        "with whole_directory(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').write_text('half')\n    print('writing', flush=True)\n    sys.stdin.read()\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "a")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    LocalStorage(tmp_path).sweep()
    assert len(list(tmp_path.rglob("half"))) == 1
    writer.kill()
    writer.communicate()
    LocalStorage(tmp_path).sweep()
    assert list(tmp_path.iterdir()) == []
