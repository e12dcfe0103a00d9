"""Making an image in a process of its own: torch costs 250 MB there, and nothing here.

The request goes to its stdin and the image comes from its stdout, pickled both ways: the two ends
are this package, of this version, and nothing else can write to the pipes.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import gptoss_convert
from gptoss_convert.containers import Image, TensorSpec
from gptoss_convert.errors import GptossError, UsageError


def image_apart(
    specs: Sequence[TensorSpec],
    states: Iterable[str],
    common: Mapping[str, object],
    *,
    files: int,
    max_file_bytes: int,
) -> Image:
    """What `image` gives for these tensors and empty `_extra_state` objects of these names."""
    request = (list(specs), list(states), dict(common), files, max_file_bytes)
    home = str(Path(gptoss_convert.__file__).parent.parent)
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.run(
        # -P: what lies in the working directory, perhaps a checkpoint, is no module.
        [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
        input=pickle.dumps(request),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"the process that serializes with torch ended with {child.returncode}")
    answer = pickle.loads(child.stdout)
    if isinstance(answer, GptossError):
        raise answer
    return answer


def serve() -> None:
    """Answer one request on stdin and stdout."""
    from gptoss_convert.containers.torch_dist import extra_state_objects, image

    specs, states, common, files, max_file_bytes = pickle.load(sys.stdin.buffer)
    try:
        answer: object = image(
            specs,
            extra_state_objects(states),
            common,
            files=files,
            max_file_bytes=max_file_bytes,
        )
    except GptossError as error:
        answer = error
    except ImportError as error:
        answer = UsageError(
            f"writing Megatron checkpoints needs torch ({error}): "
            'pip install "gptoss-convert[megatron]"'
        )
    sys.stdout.buffer.write(pickle.dumps(answer, protocol=5))
