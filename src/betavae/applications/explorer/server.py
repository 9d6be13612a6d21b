"""The server behind the page: it answers this page alone, and reads no file but the page's own."""

import ipaddress
import math
import socket
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import PurePath
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

import torch
import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from betavae.applications.explorer import uploads
from betavae.applications.explorer.queries import (
    Explorer,
    decode,
    encode,
    latent_map,
    latent_path,
    page_state,
    pixels_at,
)
from betavae.errors import UserError

MAX_JSON_BYTES = 2**20  # bytes of JSON
MAX_ABS_Z = 1000.0  # from 0, of a latent
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
STATIC_ROUTES = {"/": "index.html"} | {
    f"/{name}": name for name in ("page.css", "page.js", "common.js", "map.js", "drawing.js")
}
FILES = resources.files("betavae.applications.explorer") / "page"
MIME_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

Latent = list[Annotated[float, Field(ge=-MAX_ABS_Z, le=MAX_ABS_Z, allow_inf_nan=False)]]


class RequestBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


Q = TypeVar("Q", bound=RequestBody)


class Decode(RequestBody):
    z: list[Latent]  # one for each run


class PathRequest(RequestBody):
    start: list[Latent]
    end: list[Latent]
    steps: Annotated[int, Field(ge=2, le=50)]


class TestImage(RequestBody):
    index: Annotated[int, Field(ge=0)]


class MapRequest(BaseModel):
    """Of a query string, so not strict."""

    model_config = ConfigDict(extra="forbid")
    run: Annotated[int, Field(ge=0)] = 0
    axes: Literal["pca", "largest"] = "pca"


class UploadOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    centre: bool = False
    invert: bool = False


def app(explorer: Explorer, names: set[str], loopback: bool = True) -> Starlette:
    """The page for whoever asks for it by one of `names` or by an IP address, with `loopback` one of this machine's
    own: a name that somebody else made point here (DNS rebinding) is refused, and so is what another site's page asks.
    """

    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        refusal = rejection_reason(request, names, loopback)
        response = JSONResponse({"error": refusal}, 403) if refusal else await call_next(request)
        response.headers.update(HEADERS)
        return response

    def page(file: str) -> Callable[[Request], Response]:
        content = (FILES / file).read_bytes()
        return lambda request: Response(content, media_type=MIME_TYPES[PurePath(file).suffix])

    def get_state(request: Request) -> Response:
        return JSONResponse(page_state(explorer) | {"upload": uploads.MAX_UPLOAD_BYTES})

    def get_map(request: Request) -> Response:
        asked = MapRequest.model_validate(dict(request.query_params))
        if asked.run >= len(explorer.runs):
            raise UserError(f"run: there are {len(explorer.runs)} runs, numbered from 0")
        points, centre, axes, share = latent_map(explorer.runs[asked.run], asked.axes)
        rounded = [[round(value, 4) for value in point] for point in points.tolist()]
        return JSONResponse({"points": rounded, "centre": centre.tolist(), "axes": axes.tolist(), "share": share})

    async def post_decode(request: Request) -> Response:
        zs = latents(explorer, (await parse_body(request, Decode)).z)
        images = [decode(each, z[None])[0] for each, z in zip(explorer.runs, zs, strict=True)]
        return JSONResponse({"pictures": uploads.to_base64(torch.stack(images))})

    async def post_path(request: Request) -> Response:
        asked = await parse_body(request, PathRequest)
        starts, ends = latents(explorer, asked.start), latents(explorer, asked.end)
        rows = [latent_path(*each, asked.steps) for each in zip(explorer.runs, starts, ends, strict=True)]
        return JSONResponse({"pictures": [uploads.to_base64(row) for row in rows]})

    async def post_image(request: Request) -> Response:
        index = (await parse_body(request, TestImage)).index
        if index >= len(explorer.images):
            raise UserError(f"index: the test images are numbered 0 to {len(explorer.images) - 1}")
        return encode_response(explorer, pixels_at(explorer.images, torch.tensor([index])))

    async def post_picture(request: Request) -> Response:
        treatment = UploadOptions.model_validate(dict(request.query_params))
        content = await read_body(request, "application/octet-stream", uploads.MAX_UPLOAD_BYTES)
        data = explorer.runs[0].run.data
        look = {key: data[key] for key in ("binarize", "fit", "background") if key in data}
        pixels = uploads.read_upload(content, explorer.shape, **treatment.model_dump(), **look)
        return encode_response(explorer, pixels[None].float() / 255)

    return Starlette(
        routes=[
            *(Route(url, page(file)) for url, file in STATIC_ROUTES.items()),
            Route("/api/state", get_state),
            Route("/api/map", get_map),
            Route("/api/decode", post_decode, methods=["POST"]),
            Route("/api/path", post_path, methods=["POST"]),
            Route("/api/image", post_image, methods=["POST"]),
            Route("/api/picture", post_picture, methods=["POST"]),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
        exception_handlers={UserError: error_response, ValidationError: error_response, HTTPException: error_response},
    )


def rejection_reason(request: Request, names: set[str], loopback: bool) -> str | None:
    """Why a request is none of our page's, if it is not."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname or ""
        foreign = origin is not None and urlsplit(origin).netloc != host
    except ValueError:
        return "the address is not one of this page"
    try:
        address = ipaddress.ip_address(name)
        known = address.is_loopback or not loopback
    except ValueError:
        known = name in names
    if not known:
        return f"this page does not go by the name {name!r}"
    # Browsers say so, of a link that is followed too, which may lead to the page itself.
    elsewhere = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if foreign or (elsewhere and request.url.path != "/"):
        return "another site's page asks"
    return None


def error_response(request: Request, error: Exception) -> Response:
    """One sentence for a question that cannot be answered."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc'])) or 'the question'}: {first['msg']}"}, 400)
    return JSONResponse({"error": str(error)}, 400)


async def read_body(request: Request, kind: str, limit: int) -> bytes:
    """The content of a request, which must be said to be of that kind: one that no plain form of another site has."""
    if request.headers.get("content-type", "").partition(";")[0] != kind:
        raise HTTPException(415, f"the content must be {kind}")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > limit:
            raise HTTPException(413, f"that is too large: {limit / 2**20:g} MB are the most")
    return bytes(content)


async def parse_body(request: Request, kind: type[Q]) -> Q:
    return kind.model_validate_json(await read_body(request, "application/json", MAX_JSON_BYTES))


def latents(explorer: Explorer, values: list[list[float]]) -> list[Tensor]:
    """One for each run. Raises UserError if there are others than the runs have."""
    given, wanted = [len(z) for z in values], [each.vae.latent_dim for each in explorer.runs]
    if given != wanted:
        raise UserError(f"z: the runs have {wanted} latent dimensions, and {given} numbers are given")
    return [torch.tensor(z) for z in values]


def encode_response(explorer: Explorer, x: Tensor) -> Response:
    """What all runs make of one image, `(1, C, H, W)` in [0, 1]."""
    answers = []
    for each in explorer.runs:
        mean, scores = encode(each, x[0])
        # JSON has no number that is not finite.
        rows = [score._asdict() | {"value": score.value if math.isfinite(score.value) else None} for score in scores]
        answers.append({"mean": mean.tolist(), "scores": rows})
    return JSONResponse({"image": uploads.to_base64(x)[0], "runs": answers})


def open_socket(host: str, port: int) -> socket.socket:
    """A socket at that address; port 0: at a free one. Raises UserError if it cannot be had."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, ValueError) as error:  # ValueError: what cannot be a name
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise UserError(f"host={host} port={port} cannot be had ({reason}); port=0 takes any that is free") from error
    # asyncio sets this for sockets of its own making only; without it, answers wait 40 ms for an acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    return listening


def page_url(listening: socket.socket) -> tuple[str, str | None]:
    """The page's address, and one sentence about who can reach it, if that is not this machine alone."""
    host, port = listening.getsockname()[:2]
    address = ipaddress.ip_address(host)
    name = f"[{host}]" if ":" in host else host
    if address.is_loopback:
        return f"http://{name}:{port}", None
    here = socket.gethostname() if address.is_unspecified else name
    local = f"http://localhost:{port}" if address.is_unspecified else f"http://{name}:{port}"
    return local, (
        f"whoever can reach port {port} of this machine (http://{here}:{port}) can use the page without a password, "
        "see the test images and give it pictures; what is sent is not encrypted"
    )


def serve(explorer: Explorer, listening: socket.socket, host: str) -> None:
    """Answer until it is interrupted."""
    loopback = ipaddress.ip_address(listening.getsockname()[0]).is_loopback
    names = {"localhost", host.lower()} | (set() if loopback else {socket.gethostname().lower()})
    config = uvicorn.Config(
        app(explorer, names, loopback),
        log_level="warning",
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=1,
        proxy_headers=False,
    )
    uvicorn.Server(config).run([listening])
