"""Callbacks of one's own: write a Lightning callback here and name it in `CALLBACKS`; `callbacks.custom` in a config says
which of them a run has, each with its arguments: `callbacks: {custom: {my_callback: {every: 2}}}`."""

from lightning.pytorch.callbacks import Callback

CALLBACKS: dict[str, type[Callback]] = {}
