"""What the ranks of one machine share: every byte of weights leaves the disk once for all of them.

The first of them reads and the others receive, over NVLink if they compute on GPUs. If each rank
read for itself, bytes would leave the disk again as soon as the page cache no longer holds what the
slowest rank still needs, and the processors would copy every byte once for each rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from gptoss_convert.errors import UsageError
from gptoss_convert.machine.ranks import Ranks
from gptoss_convert.machine.threads import require_threads
from gptoss_convert.witness.fetch import ByteRange, Fetcher, length

NewFetcher = Callable[[int], Fetcher]
"""Makes a fetcher that reads at most so many bytes ahead."""
_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
_PINNING = "pinned_use_cuda_host_register:True,pinned_num_register_threads:4"
"""Page-locked memory is had at the speed of several threads; the driver takes it with one."""
_LOOPBACK = "127.0.0.1"
_FOREVER = timedelta(days=30)
"""That a rank is slow is no failure; of failures `Ranks` tells."""


def choose_device(wish: str, ranks: Ranks) -> torch.device:
    """The device of a wish, each rank of a machine its own: `auto` takes a GPU if there is one.

    Raises UsageError where there is none, or fewer than ranks, and RuntimeError without threads.
    """
    # What computes on a processor gets its threads now, while a lack of them can be told.
    require_threads(torch.get_num_threads())
    torch.zeros(1 << 20).add_(1)
    found = torch.cuda.device_count() if wish != "cpu" else 0
    if wish == "cuda" and not found:
        raise UsageError("--device cuda: no CUDA device found; choose cpu")
    if not found:
        return torch.device("cpu")
    if found < ranks.local_size:
        raise UsageError(
            f"{ranks.host}: {ranks.local_size} ranks, {found} GPUs; "
            f"start torchrun with --nproc-per-node {found}"
        )
    device = torch.device("cuda", ranks.local_rank)
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # its newer name: whoever sets either, decides
        os.environ.setdefault(_ALLOCATOR, _PINNING)
    torch.cuda.set_device(device)
    return device


@contextmanager
def sharing(ranks: Ranks, device: torch.device) -> Iterator[NewFetcher]:
    """Fetchers for `device`; the ranks of a machine must read the same in the same order."""
    if ranks.local_size == 1:
        yield lambda max_ahead: Fetcher(device, max_ahead)
        return
    _meet(ranks, device)
    yield lambda max_ahead: _SharedFetcher(device, max_ahead, ranks)
    distributed.destroy_process_group()


def _meet(ranks: Ranks, device: torch.device) -> None:
    """Let the ranks of this machine find one another; those of other machines do not take part."""
    store = None
    if ranks.local_rank == 0:
        store = TCPStore(_LOOPBACK, 0, is_master=True, wait_for_workers=False)
    # torchrun numbers the ranks of a machine one after another.
    port = ranks.gather(store.port if store else None)[ranks.rank - ranks.local_rank]
    store = store or TCPStore(_LOOPBACK, port, is_master=False)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast fails where the fabric lacks it
    on_gpu = device.type == "cuda"
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=ranks.local_rank,
        world_size=ranks.local_size,
        timeout=_FOREVER,
        device_id=device if on_gpu else None,
    )


class _SharedFetcher(Fetcher):
    """Reads on the first rank of a machine only, and hands what was read to the others."""

    def __init__(self, device: torch.device, max_ahead: int, ranks: Ranks):
        super().__init__(device, max_ahead)
        self._ranks = ranks

    def ahead(self, wanted: Sequence[tuple[ByteRange, ...]]) -> None:
        """Start to read, where the reading is done."""
        if self._ranks.local_rank == 0:
            super().ahead(wanted)

    def read(self, ranges: tuple[ByteRange, ...]) -> Tensor:
        """The bytes of `ranges` in one tensor on the device, u8; raises RankError."""
        if self._ranks.local_rank == 0:
            content = super().read(ranges)
        else:
            content = torch.empty(length(ranges), dtype=torch.uint8, device=self.device)
        try:
            distributed.broadcast(content, 0)
        except RuntimeError as error:
            # Whose connection was lost says nothing: why it ended, that rank has told.
            raise self._ranks.failure(within=5.0) or error from None
        return content
