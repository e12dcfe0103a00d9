"""Residual streams of a calibration: on the device, or in a file where that has no room."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from gptoss_convert.errors.refusals import disk_error


class Streams:
    """A tensor `[T, D]` of each batch: kept where it was made, or spilled to a file in `folder`.

    The file has no name: it is gone with the process, whatever ends it.
    """

    def __init__(self, first: Sequence[Tensor], folder: Path | None) -> None:
        self._device = first[0].device
        self._dtype = first[0].dtype
        self._shapes = [tensor.shape for tensor in first]
        self._kept: list[Tensor] = []
        self._file = None if folder is None else _unnamed(folder)
        sizes = [tensor.numel() * tensor.itemsize for tensor in first]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        if self._file is None:
            self._kept = [*first]
            return
        weakref.finalize(self, self._file.close)
        for number, tensor in enumerate(first):
            self[number] = tensor

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, number: int) -> Tensor:
        if self._file is None:
            return self._kept[number]
        nbytes = self._offsets[number + 1] - self._offsets[number]
        content = bytearray(nbytes)
        done = os.preadv(self._file.fileno(), [content], self._offsets[number])
        if done != nbytes:
            raise OSError(f"a spilled stream has {done} bytes, expected {nbytes}")
        held = torch.frombuffer(content, dtype=self._dtype).view(self._shapes[number])
        return held.to(self._device)

    def __setitem__(self, number: int, value: Tensor) -> None:
        if self._file is None:
            self._kept[number] = value
            return
        content = value.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
        try:
            done = 0
            while done < len(content):
                done += os.pwrite(self._file.fileno(), content[done:], self._offsets[number] + done)
        except OSError as error:
            raise disk_error("activations of the calibration", error) from None


def _unnamed(folder: Path) -> BinaryIO:
    return cast("BinaryIO", tempfile.TemporaryFile(dir=folder))
