"""The entry of docker-mirror, and gunicorn's configuration: ``gunicorn -c python:wsgi wsgi:app``.

gunicorn reads this module first, in its master process. The order matters: gevent patches before anything is imported
that opens a socket, the application is made once, its objects are frozen, and the workers are forked from it.
Bind address, workers, connections and timeouts are gunicorn's own options; here stands only what no option can say.
"""

from gevent import monkey

monkey.patch_all()

import contextlib
import ctypes
import gc
import ipaddress
import json
import logging
import os
import resource
import socket
import sys
import weakref
from typing import Any

import gevent
from gunicorn.http import errors
from gunicorn.workers.ggevent import GeventWorker

from mirror import create_app
from settings import Config

SEND_BUFFER = 128 << 10 if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 1 << 30 else 256 << 10  # bytes
TRIM_EVERY = 30  # seconds

_settings = Config.from_environ(os.environ)
app = create_app(_settings)

logging.basicConfig(
    stream=sys.stdout,
    level=_settings.log_level.upper(),
    format="%(asctime)s [%(process)d] [%(levelname)s] %(message)s",
)
logging.getLogger("urllib3").setLevel(logging.ERROR)  # its debug lines hold the queries of signed URLs

# Each client needs two descriptors, and the usual soft limit is 1024.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


class Worker(GeventWorker):
    """Serve with gevent, and refuse what is no HTTP as all else is refused: in JSON, and without repeating it."""

    statuses = (
        (errors.LimitRequestLine, 414, "the path is too long"),
        (errors.LimitRequestHeaders, 431, "the headers are too large"),
        (errors.UnsupportedTransferCoding, 501, "the transfer coding is not known"),
        (errors.ParseException, 400, "this is no valid HTTP request"),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waiting: weakref.WeakKeyDictionary[Any, gevent.Timeout] = weakref.WeakKeyDictionary()

    def timeout_ctx(self) -> Any:
        """Return the time limit of the wait for a connection's next request, and note it."""
        silent: Any = False  # at its end nothing is raised
        timeout = gevent.Timeout(self.cfg.keepalive, silent)
        self.waiting[gevent.getcurrent()] = timeout
        return timeout

    def handle_exit(self, sig: int, frame: Any) -> None:
        """End at SIGTERM as soon as the running requests have ended: a kept connection is none."""
        super().handle_exit(sig, frame)
        for connection, timeout in list(self.waiting.items()):
            if timeout.pending:
                gevent.get_hub().loop.run_callback(connection.throw, timeout)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Answer what gunicorn could not parse; a log line of gunicorn's own would hold the query."""
        found = (entry[1:] for entry in self.statuses if isinstance(exc, entry[0]))
        status, message = next(found, (500, "the mirror failed; its log says why"))
        level = logging.ERROR if status == 500 else logging.WARNING
        self.log.log(level, "%s got %d: %s", (addr or "-")[0], status, type(exc).__name__, exc_info=status == 500)
        body = json.dumps({"errors": [{"code": "UNSUPPORTED", "message": message, "detail": None}]}).encode()
        head = f"HTTP/1.1 {status} {message}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        with contextlib.suppress(OSError):
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


worker_class = Worker
preload_app = True
control_socket_disable = True
loglevel = _settings.log_level
accesslog = "-" if _settings.log_level in ("debug", "info") else None
# client, time, request, status, body bytes, seconds, hosts asked (a>b: a redirected to b; a,b: b was asked after a)
access_log_format = '%({mirror.client}e)s %(t)s "%(m)s %({mirror.path}e)s" %(s)s %(B)s %(L)s %({mirror.upstream}e)s'
# X-Forwarded-* is ProxyFix's alone (MIRROR_PROXIES), and nobody sets SCRIPT_NAME by a header.
forwarded_allow_ips = ""
forwarder_headers = ""


def when_ready(server: Any) -> None:
    """Before the workers are forked: bound the listener's send buffers, and share all objects made so far."""
    for listener in server.LISTENERS:
        if is_local(listener.sock):
            listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    gc.collect()
    gc.freeze()


def is_local(listener: socket.socket) -> bool:
    """Tell whether a listener is for this host only.

    There the bytes go to a terminator with no delay, and unbounded buffers would hold up to 1 MB for each slow client.
    Over a long line a bound would bound the rate.
    """
    if listener.family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def post_worker_init(worker: Any) -> None:
    """Start the greenlet that gives memory back."""
    gevent.spawn(trim_when_idle, worker)


def trim_when_idle(worker: Any) -> None:
    """Give the memory of a burst back to the system, once no request has come for a while (139 to 54 MB, measured)."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is None:  # musl
        return
    seen = trimmed = 0
    while True:
        gevent.sleep(TRIM_EVERY)
        if worker.nr == seen != trimmed:
            app.extensions["docker-mirror"].close_idle()
            gc.collect()
            malloc_trim(0)
            trimmed = seen
        seen = worker.nr
