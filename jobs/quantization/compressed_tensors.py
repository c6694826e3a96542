"""compressed-tensors W4A16: 4-bit weights in groups of 128, chosen by GPTQ on rows of the example store, activations
float. The format of vLLM, which multiplies it on GPUs; on a CPU transformers unpacks it to float weights as it loads.

llm-compressor pins another transformers, so it runs in an environment of its own (`quantize.llmcompressor_python`).
"""

import json
import subprocess
import tempfile
from pathlib import Path

from cluster.errors import QuantizationFailed
from cluster.storage import open_storage
from jobs.quantization import gptq_script
from jobs.training.data import ExampleStore


def quantize(student: str, directory: Path, python: str, storage: str, store: str, rows: int) -> dict[str, str]:
    """Writes the quantised student to a directory; returns the versions that made it.

    Args:
        python: of the environment with llm-compressor.
        storage, store: root and prefix of the example store.
        rows: of its training split that GPTQ sees, from the first.

    Raises:
        QuantizationFailed: llm-compressor ended with an error; the message has its last words.
    """
    texts = ExampleStore(open_storage(storage), store, "train")
    with tempfile.TemporaryDirectory(prefix="raystill-gptq-") as name:
        file = Path(name) / "rows.jsonl"
        ids = [texts.row(index).token_ids.tolist() for index in range(min(rows, len(texts)))]
        file.write_text("\n".join(map(json.dumps, ids)))
        # Isolated: else the script's own folder, where this file lies, would stand for the package of its name.
        command = [python, "-I", gptq_script.__file__, student, str(directory), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=name)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
        raise QuantizationFailed(f"scheme compressed_tensors_w4a16: llm-compressor failed ({said[-1][:300]})")
    asked = "import importlib.metadata as m; print(m.version('llmcompressor'), m.version('compressed-tensors'))"
    compressor, tensors = subprocess.run([python, "-c", asked], capture_output=True, text=True).stdout.split()
    return {"llmcompressor": compressor, "compressed-tensors": tensors}
