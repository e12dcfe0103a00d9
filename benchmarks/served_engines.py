"""What real engines are found to answer, on a CPU: `python -m benchmarks.served_engines`.

Each takes programs that are not installed with the project, and is left out without its options:

    python3.11 -m venv mlx && mlx/bin/pip install "mlx[cpu]" mlx-lm
    python -m benchmarks.served_engines --mlx mlx/bin/python

    # llama-cpp-python's source holds llama.cpp: build the target llama-server with cmake.
    python -m benchmarks.served_engines --llama-server build/bin/llama-server --llama-cpp llama.cpp

The model is tiny, but for YaRN's numbers as released, which llama.cpp takes for granted; its files
are our own MXFP4 output. Prompts go beyond the window and YaRN's original length.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from gptoss_convert import ServedOptions, convert, verify_served
from gptoss_convert.conversion.options import Options
from gptoss_convert.synth.synth import synth
from tests.tiny_files import write_openai
from tests.tiny_models import TinyShape, random_weights

SHAPE = TinyShape(
    layers=4, hidden=224, inter=160, heads=8, kv_heads=2, head_dim=64, experts=8, vocab=288,
    original_length=512, beta_fast=32.0,
)  # fmt: skip
TO_GGUF = """
import sys
sys.path[:0] = [sys.argv[1] + "/gguf-py", sys.argv[1]]
from conversion import base
from conversion.gpt_oss import GptOssModel

def set_vocab(self):
    self._set_vocab_gpt2()
    # The tokenizer of single bytes has no merges; token ids are sent, so none is ever made.
    self.gguf_writer.add_token_merges(["h e"])

base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-4o"
GptOssModel.set_vocab = set_vocab
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def model(folder: Path) -> Path:
    """An MXFP4 directory that this project wrote, with a tokenizer."""
    synth(folder / "tokenizer", layers=1)
    original = write_openai(folder / "original", SHAPE, random_weights(SHAPE, seed=3))
    target = folder / "gpt-oss-tiny"
    convert(original, target, Options(to="hf", dtype="mxfp4", tokenizer=folder / "tokenizer"))
    shutil.rmtree(folder / "original")
    return target


@contextmanager
def started(words: Sequence[object], port: int) -> Iterator[str]:
    """A server's address, once it listens."""
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([*map(str, words)], stdout=log, stderr=log)
        try:
            for _ in range(240):
                time.sleep(0.5)
                if server.poll() is not None:
                    raise SystemExit(f"{words[0]}: ended with status {server.returncode}")
                try:
                    urlopen(f"{url}/v1/models", timeout=5).close()
                except (URLError, OSError):
                    continue
                break
            yield url
        finally:
            server.terminate()
            server.wait()


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mlx", type=Path, help="a Python with mlx-lm")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server")
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's source, to make a GGUF file")
    parser.add_argument("--sample", type=int, default=96, help="positions that are asked about")
    given, port = parser.parse_args(), free_port()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = model(folder)
        servers: dict[str, list[object]] = {}
        if given.mlx:
            servers["mlx-lm"] = [
                given.mlx,
                "-m",
                "mlx_lm",
                "server",
                "--model",
                source,
                "--port",
                port,
            ]
        if given.llama_server:
            gguf = folder / "tiny.gguf"
            words = [sys.executable, "-c", TO_GGUF, given.llama_cpp, source, "--outfile", gguf]
            subprocess.run([*map(str, words), "--outtype", "bf16"], check=True, capture_output=True)
            servers["llama.cpp"] = [
                given.llama_server,
                "-m",
                gguf,
                "--port",
                port,
                "-c",
                1024,
                "-np",
                1,
            ]
        for name, words in servers.items():
            with started(words, port) as url:
                # mlx-lm lists the models of the Hub's cache as well.
                chosen = str(source.resolve()) if name == "mlx-lm" else None
                options = ServedOptions(model=chosen, device="cpu", sample=given.sample)
                found = verify_served(source, url, options)
            everywhere = found.levels[1].numbers["ranges"][0]
            floor = everywhere["floor"]["kl_median"]
            print(f"{name}: {found.verdict}; {floor:.1e} is bfloat16's own", flush=True)


if __name__ == "__main__":
    main()
