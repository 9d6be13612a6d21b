"""Reading images that stay on the host while the training device is busy."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def read_ahead(
    read: Callable[[Item], Iterable[Tensor]], items: Iterable[Item], device: torch.device
) -> Iterator[tuple[Item, list[Tensor]]]:
    """Yield each item with what `read(item)` returns, on `device`; a thread reads the next one meanwhile."""

    def read_pinned(item: Item) -> list[Tensor]:
        # From pinned memory a GPU copies without the host waiting.
        return [part.pin_memory() if device.type == "cuda" else part for part in read(item)]

    def sent(item: Item, reading: Future[list[Tensor]]) -> tuple[Item, list[Tensor]]:
        # Only CUDA keeps the source alive until it is copied (pytorch/pytorch#189690, of MPS).
        return item, [part.to(device, non_blocking=device.type == "cuda") for part in reading.result()]

    with ThreadPoolExecutor(1) as thread:
        waiting = deque[tuple[Item, Future[list[Tensor]]]]()
        for item in items:
            waiting.append((item, thread.submit(read_pinned, item)))
            if len(waiting) > 1:
                yield sent(*waiting.popleft())
        if waiting:
            yield sent(*waiting.popleft())
