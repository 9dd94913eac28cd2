"""`serve`: an HTTP server in the form of OpenAI's API, with a page to chat on."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from mm_jax.cli.parser import Parser, add_weights
from mm_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "serve",
        "Answer over HTTP: /v1/chat/completions, /v1/completions and /v1/models as in OpenAI's API, a page to\n"
        "chat on at /, /health and /metrics (Prometheus). Requests share one batch. Ctrl-C or SIGTERM lets the\n"
        "answers under way end.",
        "python -m mm_jax serve runs/quickstart --port 8000",
    )
    parser.add_argument("run", help="run directory, or Hugging Face checkpoint")
    parser.add_argument("--stage", help="use the checkpoint of this stage (default: the newest)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    parser.add_argument("--name", help="name of the model in requests (default: that of the directory)")
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="answers under way at a time (8)")
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait (64)")
    parser.add_argument(
        "--max-length", type=int, default=0, metavar="N",
        help="most tokens of prompt and answer together (default: what the model was made for)",
    )  # fmt: skip
    parser.add_argument(
        "--api-key", default=os.environ.get("MM_JAX_API_KEY", ""), metavar="KEY",
        help="what clients must send (default: $MM_JAX_API_KEY, or none)",
    )  # fmt: skip
    parser.add_argument("--max-body", type=float, default=32, metavar="MIB", help="size of a request (32)")
    parser.add_argument(
        "--max-pixels", type=int, default=50_000_000, metavar="N", help="pixels of a picture (50000000)"
    )
    parser.add_argument("--max-images", type=int, default=64, metavar="N", help="pictures of a request (64)")
    parser.add_argument(
        "--max-frames", type=int, default=256, metavar="N",
        help="frames that are looked at of the videos of a request; longer ones are thinned out (256)",
    )  # fmt: skip
    parser.add_argument(
        "--max-video-pixels", type=int, default=200_000_000, metavar="N",
        help="pixels of these frames together (200000000)",
    )  # fmt: skip
    parser.add_argument(
        "--max-seconds", type=float, default=600, metavar="S", help="seconds of sound of a request (600)"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="HOST",
        help="fetch pictures from this host, or *.example.org; may be repeated (default: none is fetched)",
    )  # fmt: skip
    parser.add_argument("--fetch-bytes", type=float, default=16, metavar="MIB", help="of such a picture (16)")
    parser.add_argument(
        "--fetch-seconds", type=float, default=10, metavar="S", help="for those of one request (10)"
    )
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="longest request (600)")
    parser.add_argument(
        "--drain", type=float, default=30, metavar="S", help="time for answers to end after SIGTERM (30)"
    )
    add_weights(parser)
    options = parser.parse_args(argv)
    if not 0 < options.port < 2**16:
        raise UserError(f"--port is {options.port}; it must be 1 to 65535")
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed; the server needs: pip install 'mm_jax[serve]'"
        ) from None

    from mm_jax.lm import load_lm  # after --help: this imports jax
    from mm_jax.serve.app import build
    from mm_jax.serve.options import ServeOptions
    from mm_jax.serve.remote import Remote
    from mm_jax.train.setup import enable_compilation_cache

    settings = ServeOptions(
        model=options.name or Path(options.run).resolve().name,
        slots=options.slots,
        queue=options.queue,
        max_length=options.max_length,
        api_key=options.api_key,
        max_body=int(options.max_body * 2**20),
        max_pixels=options.max_pixels,
        max_images=options.max_images,
        max_frames=options.max_frames,
        max_video_pixels=options.max_video_pixels,
        max_seconds=options.max_seconds,
        remote=Remote(tuple(options.allow_host), int(options.fetch_bytes * 2**20), options.fetch_seconds),
        timeout=options.timeout,
        drain=options.drain,
    )
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("mm_jax.serve").setLevel(logging.INFO)
    enable_compilation_cache()
    app = build(load_lm(options.run, options.stage, options.weights), settings)
    print(f"{settings.model} on http://{options.host}:{options.port}", flush=True)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            log_level="warning",
            lifespan="on",
            timeout_graceful_shutdown=int(settings.drain) or 1,
        )
    )
    # uvicorn raises the signals that ended it once more: it has done what they ask for
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: None)
    server.run()
    if not server.started:
        raise UserError(f"cannot listen on {options.host}:{options.port}")
    return 0
