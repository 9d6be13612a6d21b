"""HTTP server of the page. It answers only its own page and reads no files except the page's."""

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

from betavae.applications.explorer import queries, uploads
from betavae.applications.explorer.queries import Explorer
from betavae.data.scaling import Scaling
from betavae.errors import UserError

MAX_JSON_BYTES = 2**20
MAX_ABS_Z = 1000.0
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
PAGE_FOLDER = resources.files("betavae.applications.explorer") / "page"
STATIC_ROUTES = {"/": "index.html"} | {
    f"/{name}": name for name in ("page.css", "page.js", "common.js", "map.js", "drawing.js")
}
MIME_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

Latent = list[Annotated[float, Field(ge=-MAX_ABS_Z, le=MAX_ABS_Z, allow_inf_nan=False)]]
Label = Annotated[int, Field(ge=0)] | None  # number of a class


class RequestBody(BaseModel):
    """A JSON body."""

    model_config = ConfigDict(strict=True, extra="forbid")


Body = TypeVar("Body", bound=RequestBody)


class DecodeRequest(RequestBody):
    """One latent per run, and the label for conditional models."""

    z: list[Latent]
    label: Label = None


class PathRequest(RequestBody):
    """One latent per run for each end."""

    start: list[Latent]
    end: list[Latent]
    steps: Annotated[int, Field(ge=2, le=50)]
    label: Label = None


class ImageRequest(RequestBody):
    """The number of a test image."""

    index: Annotated[int, Field(ge=0)]


class MapRequest(BaseModel):
    """A query string; not strict, since its values are text."""

    model_config = ConfigDict(extra="forbid")
    run: Annotated[int, Field(ge=0)] = 0
    axes: Literal["pca", "largest", "tsne"] = "pca"


class SampleRequest(BaseModel):
    """A query string; not strict, since its values are text."""

    model_config = ConfigDict(extra="forbid")
    label: Label = None


class UploadOptions(BaseModel):
    """A query string; not strict, since its values are text."""

    model_config = ConfigDict(extra="forbid")
    center: bool = False
    invert: bool = False
    label: Label = None


def build_app(explorer: Explorer, names: set[str], loopback: bool = True) -> Starlette:
    """Build the application that serves the page.

    Requests from other sites' pages are rejected, and so are requests for a host name that another site made point to
    this machine (DNS rebinding).

    Args:
        explorer: The models and test images.
        names: The host names of the page.
        loopback: Whether the page has loopback addresses only, or any IP address.
    """

    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        reason = find_rejection_reason(request, names, loopback)
        response = JSONResponse({"error": reason}, 403) if reason else await call_next(request)
        response.headers.update(HEADERS)
        return response

    def serve_file(file: str) -> Callable[[Request], Response]:
        content = (PAGE_FOLDER / file).read_bytes()
        return lambda request: Response(content, media_type=MIME_TYPES[PurePath(file).suffix])

    def get_state(request: Request) -> Response:
        return JSONResponse(queries.build_page_state(explorer) | {"max_upload_bytes": uploads.MAX_UPLOAD_BYTES})

    def get_map(request: Request) -> Response:
        query = MapRequest.model_validate(dict(request.query_params))
        if query.run >= len(explorer.models):
            raise UserError(f"run={query.run} is invalid: expected 0 to {len(explorer.models) - 1}")
        model = explorer.models[query.run]
        if query.axes == "tsne":  # no plane, so z has no place on it
            return JSONResponse({"points": round_points(model.tsne)})
        points, center, axes, share = queries.compute_map(model, query.axes)
        plane = {"center": center.tolist(), "axes": axes.tolist(), "share": share}
        return JSONResponse({"points": round_points(points), **plane})

    def get_sample(request: Request) -> Response:
        label = explorer.check_label(SampleRequest.model_validate(dict(request.query_params)).label)
        return JSONResponse({"z": [z.tolist() for z in queries.sample_prior(explorer, label)]})

    async def post_decode(request: Request) -> Response:
        body = await parse_body(request, DecodeRequest)
        zs, label = parse_latents(explorer, body.z), explorer.check_label(body.label)
        pairs = zip(explorer.models, zs, strict=True)
        images = [queries.decode_latents(model, z[None], label)[0] for model, z in pairs]
        return JSONResponse({"images": uploads.to_base64(torch.stack(images))})

    async def post_path(request: Request) -> Response:
        body = await parse_body(request, PathRequest)
        starts, ends = parse_latents(explorer, body.start), parse_latents(explorer, body.end)
        lines, label = zip(explorer.models, starts, ends, strict=True), explorer.check_label(body.label)
        paths = [queries.decode_path(*line, body.steps, label) for line in lines]
        return JSONResponse({"images": [uploads.to_base64(path) for path in paths]})

    async def post_image(request: Request) -> Response:
        index = (await parse_body(request, ImageRequest)).index
        if index >= len(explorer.images):
            raise UserError(f"index={index} is invalid: expected 0 to {len(explorer.images) - 1}")
        pixels, label = explorer.images.pixels.index_select(0, torch.tensor([index])), explorer.images.labels[[index]]
        return build_encode_response(explorer, pixels, label)

    async def post_upload(request: Request) -> Response:
        options = UploadOptions.model_validate(dict(request.query_params))
        content = await read_body(request, "application/octet-stream", uploads.MAX_UPLOAD_BYTES)
        data, scaling = explorer.models[0].run.data, explorer.models[0].run.scaling
        look = {key: data[key] for key in ("binarize", "fit", "background") if key in data}
        pixels = uploads.read_upload(content, explorer.image_shape, options.center, options.invert, **look)
        if not scaling.is_bytes:
            pixels = scaling.to_stored(scaling.from_picture(Scaling.unit().apply(pixels)))
        return build_encode_response(explorer, pixels[None], explorer.check_label(options.label))

    return Starlette(
        routes=[
            *(Route(url, serve_file(file)) for url, file in STATIC_ROUTES.items()),
            Route("/api/state", get_state),
            Route("/api/map", get_map),
            Route("/api/sample", get_sample),
            Route("/api/decode", post_decode, methods=["POST"]),
            Route("/api/path", post_path, methods=["POST"]),
            Route("/api/image", post_image, methods=["POST"]),
            Route("/api/upload", post_upload, methods=["POST"]),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
        exception_handlers=dict.fromkeys((UserError, ValidationError, HTTPException), build_error_response),
    )


def round_points(points: Tensor) -> list[list[float]]:
    """Round points `(N, 2)` for a shorter answer."""
    return [[round(value, 4) for value in point] for point in points.tolist()]


def find_rejection_reason(request: Request, names: set[str], loopback: bool) -> str | None:
    """Find why a request is not from this page; None if it is."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname or ""
        is_foreign = origin is not None and urlsplit(origin).netloc != host
    except ValueError:
        return "the host or origin is not a valid address"
    try:
        address = ipaddress.ip_address(name)
        is_known = address.is_loopback or not loopback
    except ValueError:
        is_known = name in names
    if not is_known:
        return f"this page has no host name {name!r}"
    # Browsers send this header also when a link is followed, which may lead to the page itself.
    is_elsewhere = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if is_foreign or (is_elsewhere and request.url.path != "/"):
        return "the request is from another site's page"
    return None


def build_error_response(request: Request, error: Exception) -> Response:
    """Describe an invalid request in one sentence."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc'])) or 'the request'}: {first['msg']}"}, 400)
    return JSONResponse({"error": str(error)}, 400)


async def read_body(request: Request, content_type: str, max_bytes: int) -> bytes:
    """Read the body of a request with a content type that a plain form of another site does not have."""
    if request.headers.get("content-type", "").partition(";")[0] != content_type:
        raise HTTPException(415, f"the content type is invalid: expected {content_type}")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > max_bytes:
            raise HTTPException(413, f"the content is too large: expected at most {max_bytes / 2**20:g} MB")
    return bytes(content)


async def parse_body(request: Request, kind: type[Body]) -> Body:
    """Parse a JSON body."""
    return kind.model_validate_json(await read_body(request, "application/json", MAX_JSON_BYTES))


def parse_latents(explorer: Explorer, values: list[list[float]]) -> list[Tensor]:
    """Convert one latent per model to tensors; raise UserError if their dimensions are not the models'."""
    found, expected = [len(z) for z in values], [model.vae.latent_dim for model in explorer.models]
    if found != expected:
        raise UserError(f"z is invalid: expected {expected} latent dimensions, found {found}")
    return [torch.tensor(z) for z in values]


def build_encode_response(explorer: Explorer, pixels: Tensor, label: Tensor | None) -> Response:
    """Encode and score one stored image `(1, C, H, W)`, with its `label` (1,), with all models."""
    rows = []
    for model in explorer.models:
        mean, scores = queries.encode_image(model, model.run.scaling.apply(pixels)[0], label)
        # JSON has no number that is not finite.
        values = [score._asdict() | {"value": score.value if math.isfinite(score.value) else None} for score in scores]
        rows.append({"mean": mean.tolist(), "scores": values})
    scaling = explorer.models[0].run.scaling
    picture = scaling.to_picture(scaling.apply(pixels)).clamp(0, 1)
    return JSONResponse({"image": uploads.to_base64(picture)[0], "runs": rows})


def open_socket(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 takes any free port.

    Raises:
        UserError: If the address is taken or invalid.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, ValueError) as error:  # ValueError is raised for a text that is not a host name.
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise UserError(f"host={host} port={port} is not available ({reason}); port=0 takes any free port") from error
    # asyncio does this only for sockets it opened itself; without it, answers wait 40 ms for an acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    return listener


def get_page_url(listener: socket.socket) -> tuple[str, str | None]:
    """Return the page's URL, and a warning if other machines can reach it."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    name = f"[{host}]" if ":" in host else host
    if address.is_loopback:
        return f"http://{name}:{port}", None
    public = socket.gethostname() if address.is_unspecified else name
    local = "localhost" if address.is_unspecified else name
    return f"http://{local}:{port}", (
        f"everyone who can reach http://{public}:{port} can use the page without a password, see the test images and "
        "upload pictures; the connection is not encrypted"
    )


def serve(explorer: Explorer, listener: socket.socket, host: str) -> None:
    """Serve the page until interrupted."""
    loopback = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    names = {"localhost", host.lower()} | (set() if loopback else {socket.gethostname().lower()})
    config = uvicorn.Config(
        build_app(explorer, names, loopback),
        log_level="warning",
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=1,
        proxy_headers=False,
    )
    uvicorn.Server(config).run([listener])
