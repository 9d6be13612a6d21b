"""A page to explore latent spaces in a browser: `python scripts/explore.py [ckpt=PATH ckpt=[A,B] port=0]`."""

# mypy: disable-error-code="valid-type"

import contextlib
import os
import re
import sys
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from betavae.runtime.cli import RunsSettings, gc_paused, script_command
from betavae.runtime.settings import NonEmptyStr, OptionalPathStr, constrained

Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]
Paths: Any = constrained(Name | Names | None, "null, a text, or a list of texts such as [runs/a,runs/b]")
Port = constrained(int, "a whole number from 0 to 65535", ge=0, le=65535)


class Settings(RunsSettings):
    ckpt: Paths = Field(
        None, title="a checkpoint, run folder or sweep, or several: [A,B]; null: the newest finished run"
    )
    data_root: OptionalPathStr = Field(None, title="the data folder; null: the one it was trained with")
    host: NonEmptyStr = Field(
        "127.0.0.1", title="who may see the page: this machine alone, or with 0.0.0.0 whoever reaches it"
    )
    port: Port = Field(0, title="of the page; 0: one that is free")
    browser: bool = Field(True, title="false: the page is not opened, its address is printed")


@script_command(Settings)
def main(settings: Settings) -> None:
    from betavae.errors import UserError

    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise UserError(f'the explorer needs {" and ".join(missing)}: `pip install -e ".[explore]"`')
    with gc_paused():
        import torch

        from betavae.applications.anomalies import report
        from betavae.applications.explorer import server
        from betavae.applications.explorer.queries import load_models
        from betavae.runtime import checkpoint

    # One image at a time gains nothing by more; and beside a training they wait for each other, fifty times as long.
    torch.set_num_threads(1)
    listening = server.open_socket(settings.host, settings.port)
    named = settings.ckpt if isinstance(settings.ckpt, list) else [settings.ckpt]
    runs = [checkpoint.load(path, settings.runs) for name in named for path in members(name)]
    detectors = [report.load_cached_detector(run) for run in runs]
    explorer = load_models(runs, settings.data_root, [detector and detector.p_values for detector in detectors])
    url, warning = server.page_url(listening)
    print("\n".join(str(run.path) for run in runs))
    print(f"the page is at {url} until Ctrl-C", flush=True)
    if warning:
        print(warning, flush=True)
    # Without a display, it could only be a browser of the terminal, in whose way this is.
    if settings.browser and (sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)):
        webbrowser.open(url)
    # uvicorn hands the signal on, once it has ended.
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        server.serve(explorer, listening, settings.host)
    print("the page is closed")


def members(name: str | None) -> list[str | None]:
    """The runs of a sweep, numbers in their names by value; or the one run."""
    folder = Path(name).expanduser() if name else None
    if folder is None or not folder.is_dir() or (folder / "checkpoints").is_dir():
        return [name]
    found = {str(path.parents[1]) for path in folder.glob("*/checkpoints/*.ckpt")}

    def key(path: str) -> list[Any]:
        parts = re.split(r"(\d+(?:\.\d+)?)", path)
        return [float(part) if number % 2 else part for number, part in enumerate(parts)]

    return [*sorted(found, key=key)] or [name]


if __name__ == "__main__":
    main()
