"""Explore latent spaces in a browser: `python scripts/explore.py [ckpt=PATH ckpt=[A,B] port=0]`."""

import contextlib
import os
import sys
import webbrowser
from importlib.util import find_spec
from typing import Annotated, Any

from pydantic import Field

from betavae.errors import UserError
from betavae.runtime.cli import RunsSettings, gc_paused, script_command
from betavae.runtime.settings import NonEmptyStr, PathStr

Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]
Paths: Any = Name | Names | None
Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(RunsSettings):
    ckpt: Paths = Field(None, title="a checkpoint, run or sweep folder, or a list; null: the newest finished run")
    data_root: PathStr | None = Field(None, title="the data folder; null: the one used in training")
    host: NonEmptyStr = Field("127.0.0.1", title="address of the page: this machine only, or 0.0.0.0 for the network")
    port: Port = Field(0, title="port of the page; 0: any free port")
    browser: bool = Field(True, title="open the page in a browser")


@script_command(Settings)
def main(settings: Settings) -> None:
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise UserError(f'the explorer needs {" and ".join(missing)}: pip install -e ".[explore]"')
    with gc_paused():
        import torch

        from betavae.applications.explorer import server
        from betavae.applications.explorer.queries import list_runs, load_models
        from betavae.runtime import checkpoint

    # More threads do not speed up one image; beside a training run they would wait for each other.
    torch.set_num_threads(1)
    listener = server.open_socket(settings.host, settings.port)
    names = settings.ckpt if isinstance(settings.ckpt, list) else [settings.ckpt]
    runs = [checkpoint.load(path, settings.runs) for name in names for path in list_runs(name)]
    for run in runs:
        run.require_images("explore.py")
    explorer = load_models(runs, settings.data_root, load_p_values(runs))
    url, warning = server.get_page_url(listener)
    print("\n".join(str(run.path) for run in runs))
    print(f"serving the page at {url}; press Ctrl-C to stop", flush=True)
    if warning:
        print(warning, flush=True)
    # Without a display, a text browser would open in the terminal.
    if settings.browser and (sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)):
        webbrowser.open(url)
    # uvicorn raises the signal again after it has shut down.
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        server.serve(explorer, listener, settings.host)
    print("the server has stopped")


def load_p_values(runs: list[Any]) -> list[Any]:
    """Return the p-values of each run's anomaly detector, if scripts/detect.py has fitted one."""
    try:
        from betavae.applications.anomalies.report import load_cached_detector
    except ModuleNotFoundError:  # This application was deleted.
        return [None] * len(runs)
    detectors = [load_cached_detector(run) for run in runs]
    return [detector and detector.compute_p_values for detector in detectors]


if __name__ == "__main__":
    main()
