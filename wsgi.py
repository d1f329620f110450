"""The entry of docker-mirror, and gunicorn's configuration: ``gunicorn -c python:wsgi wsgi:app``.

gunicorn reads this module first, in its master process. The order matters: gevent patches before anything is imported
that opens a socket, the application is made once, its objects are frozen, and the workers are forked from it.
Bind address, workers, connections and timeouts are gunicorn's own options; here stands only what no option can say.
"""

from gevent import monkey

monkey.patch_all()

import contextlib
import ctypes
import errno
import fcntl
import gc
import ipaddress
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
import warnings
from functools import partial
from http import HTTPStatus
from typing import Any

import gevent
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn import glogging
from gunicorn import systemd
from gunicorn import util
from gunicorn.http import Request
from gunicorn.http import errors
from gunicorn.http import wsgi as gunicorn_wsgi
from gunicorn.http.parser import RequestParser
from gunicorn.workers.base_async import AsyncWorker
from gunicorn.workers.ggevent import GeventWorker

# requests does without it, with a warning, where nobody asks it to guess a text's encoding; it would take 2 MB.
sys.modules["charset_normalizer"] = None  # type: ignore[assignment]
warnings.filterwarnings("ignore", "Unable to find acceptable character detection dependency")

from mirror import below
from mirror import create_app
from mirror import takes_body
from settings import Config

HEAD_SECONDS = 20  # until a request is there whole: after the connection, or after its first byte on a kept one
SEND_SECONDS = 300  # that a client may take no byte of its answer
MAX_HEADERS = 16 << 10  # bytes of all headers of a request
AT_ONCE = 32  # idle clients that have to go where no descriptor is left
OWN_FILES = 64  # descriptors besides those of each client: its own, upstream's, and a file of the cache
SEND_BUFFER = 128 << 10 if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 1 << 30 else 256 << 10  # bytes
TRIM_EVERY = 30  # seconds
TIDY_EVERY = 3600  # seconds
PR_SET_PDEATHSIG = 1  # prctl(2)

_settings = Config.from_environ(os.environ)
app = create_app(_settings)


def counting(application: Any) -> Any:
    """Let the application count what it sends past gunicorn, into gunicorn's response: the access line shows it."""

    def call(environ: Any, start_response: Any) -> Any:
        environ["gunicorn.response"] = start_response.__self__
        return application(environ, start_response)

    return call


app.wsgi_app = counting(app.wsgi_app)  # type: ignore[method-assign]

logging.basicConfig(
    stream=sys.stdout,
    level=_settings.log_level.upper(),
    format="%(asctime)s [%(process)d] [%(levelname)s] %(message)s",
)
logging.getLogger("urllib3").setLevel(logging.ERROR)  # its debug lines hold the queries of signed URLs

# Each client needs two descriptors, and the usual soft limit is 1024.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


class BoundedRequest(Request):
    """Bound all headers of a request together: gunicorn bounds each, and their number, and would take 800 KB."""

    def parse(self, unreader: Any) -> bytes:
        """Read and parse the head."""
        self.max_buffer_headers = MAX_HEADERS
        return super().parse(unreader)


RequestParser.mesg_class = BoundedRequest


class Parts(list[bytes]):
    """Hold what is to be sent at once."""

    sendall = list.append


class Response(gunicorn_wsgi.Response):
    """Send the head together with the first bytes of the body, if there are some; gunicorn would send each alone."""

    def write(self, arg: bytes) -> None:
        """Send bytes; none send the head."""
        if self.headers_sent or not arg:
            super().write(arg)
            return
        client, parts = self.sock, Parts()
        self.sock: Any = parts
        try:
            super().write(arg)
        finally:
            self.sock = client
        client.sendall(b"".join(parts))


gunicorn_wsgi.Response = Response  # type: ignore[misc]


all_atoms = glogging.Logger.atoms


def shown_atoms(self: Any, resp: Any, req: Any, environ: Any, request_time: Any) -> Any:
    """Return the parts of the access line by their names, all that gunicorn knows for a format that is not ours.

    gunicorn itself would write all headers and the whole environment down for each line.
    """
    if self.cfg.access_log_format != access_log_format:
        return all_atoms(self, resp, req, environ, request_time)
    noted = ("mirror.client", "mirror.path", "mirror.upstream")
    shown = [(f"{{{name}}}e", environ[name]) for name in noted if name in environ]
    shown += [("{x-cache}o", value) for name, value in resp.headers if name.lower() == "x-cache"]
    return {
        "t": self.now(),
        "m": environ["REQUEST_METHOD"],
        "s": str(resp.status).partition(" ")[0],
        "B": resp.sent,
        "L": f"{request_time.seconds}.{request_time.microseconds:06}",
        **dict(shown),
    }


glogging.Logger.atoms = shown_atoms  # type: ignore[method-assign]  # its logger for statsd is derived from it


class NoDescriptor(gevent.GreenletExit):
    """Say that no descriptor is left for a new client; gevent prints no traceback of its kind."""


class Server(StreamServer):
    """Accept the clients of one listener. All listeners of a worker share its pool, which bounds them together."""

    def __init__(self, worker: Any, listener: Any, **options: Any) -> None:
        super().__init__(listener, partial(worker.handle, listener), spawn=worker.pool, **options)
        self._worker = worker
        if worker.cfg.workers > 1:
            self.max_accept = 1

    def do_read(self) -> Any:
        """Accept a client. Where no descriptor is left, gevent waits up to a second before it tries again."""
        try:
            return super().do_read()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            for _ in range(AT_ONCE):
                self._worker.make_room()
            if self.delay == self.max_delay:  # it lasts
                self._worker.log.warning("no new client can be taken: %s", error.strerror)
            raise NoDescriptor from error


class Worker(GeventWorker):
    """Serve with gevent, and end the connections of which no request comes in time.

    What is no HTTP is refused as all else is refused: in JSON, and without repeating it.
    """

    statuses = (
        (errors.LimitRequestLine, 414, "the path is too long"),
        (errors.LimitRequestHeaders, 431, "the headers are too large"),
        (errors.UnsupportedTransferCoding, 501, "the transfer coding is not known"),
        (errors.ExpectationFailed, 417, "the expectation is not known"),
        (errors.ParseException, 400, "this is no valid HTTP request"),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pool: Any = None
        # Until when each client has to send a request, the one that waits longest first.
        self.waiting: dict[Any, float] = {}
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        clients = max(1, (files - OWN_FILES) // (2 if _settings.cache_dir is None else 3))
        if clients < self.worker_connections:
            self.log.warning("%d clients at once and no more: only %d files may be open", clients, files)
            self.worker_connections = clients

    def server_class(self, listener: Any, spawn: Pool, **options: Any) -> Server:  # type: ignore[override]
        """Return the server of a listener; gunicorn would give each a pool of its own."""
        if self.pool is None:
            self.pool = spawn
        ssl_options = {key: value for key, value in options.items() if key == "ssl_context"}
        return Server(self, listener, **ssl_options)

    def timeout_ctx(self) -> Any:
        """Return no time limit of gunicorn's, which would be one for the wait and the head together."""
        return contextlib.nullcontext()

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve a connection."""
        self.keep_room()
        self.waiting[client] = time.monotonic() + HEAD_SECONDS
        try:
            super().handle(listener, client, addr)
        finally:
            self.waiting.pop(client, None)

    def handle_request(self, listener_name: Any, req: Any, client: Any, addr: Any) -> None:  # type: ignore[override]
        """Answer a request, and wait for the first byte of the next one."""
        if has_body(req):  # it still has to come in time, and no other request comes after it
            req.force_close()
            req._expected_100_continue &= takes_body(req.method, below(_settings.path_prefix, req.path) or "")
        else:
            self.waiting.pop(client, None)
        try:
            AsyncWorker.handle_request(self, listener_name, req, client, addr)
        except (gevent.GreenletExit, SystemExit):
            raise StopIteration from None  # gunicorn would go on with the connection on which an answer broke off
        except StopIteration:
            if has_body(req):
                util.close_graceful(client)
            raise
        except TimeoutError as error:  # SEND_SECONDS are over
            raise ConnectionResetError(errno.ECONNRESET, "the client takes nothing") from error
        self.wait_for_next(req.unreader, client)

    def wait_for_next(self, unreader: Any, client: Any) -> None:
        """Return when the next request begins, or the connection has ended."""
        self.waiting[client] = time.monotonic() + self.cfg.keepalive
        self.keep_room()
        if unreader.buf.getbuffer().nbytes:
            gevent.sleep()  # it has begun already; the other clients have their turn all the same
        else:
            gevent.socket.wait_read(client.fileno())
        if client in self.waiting:
            self.waiting[client] = time.monotonic() + HEAD_SECONDS

    def keep_room(self) -> None:
        """Make room where few places are left for new clients."""
        if self.pool.free_count() <= self.pool.size // 50:
            self.make_room()

    def make_room(self) -> None:
        """Let go of the client that waits longest, if any does; never of one that is being answered."""
        if self.waiting:
            self.let_go(next(iter(self.waiting)))

    def let_go(self, client: Any) -> None:
        """End the wait for a client's request: the next read finds the end, after what has come already."""
        del self.waiting[client]
        with contextlib.suppress(OSError):
            client._sock.shutdown(socket.SHUT_RD)

    def let_go_in_time(self) -> None:
        """Let go of the clients whose time is over; at this worker's end, of all that wait."""
        now = time.monotonic()
        for client in [client for client, until in self.waiting.items() if until < now or not self.alive]:
            self.let_go(client)

    def notify(self) -> None:
        """Tell the master that this worker lives, look after clients, count: gunicorn calls this each second."""
        super().notify()
        self.let_go_in_time()
        app.extensions["docker-mirror"].tick()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """End at SIGTERM as soon as the running requests have ended: a kept connection is none."""
        super().handle_exit(sig, frame)
        self.let_go_in_time()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what gunicorn could not parse; a log line of gunicorn's own would hold the query."""
        found = (entry[1:] for entry in self.statuses if isinstance(exc, entry[0]))
        status, message = next(found, (500, "the mirror failed; its log says why"))
        level = logging.ERROR if status == 500 else logging.WARNING
        self.log.log(level, "%s got %d: %s", (addr or "-")[0], status, type(exc).__name__, exc_info=status == 500)
        with contextlib.suppress(OSError):
            client.sendall(refusal(status, message))
            util.close_graceful(client)


def refusal(status: int, message: str) -> bytes:
    """Return an answer in JSON. Where there is a secret path it is bare: the client may not know that path."""
    body, kind = (
        json.dumps({"errors": [{"code": "UNSUPPORTED", "message": message, "detail": None}]}),
        "application/json",
    )
    if _settings.path_prefix:
        body, kind, message = "", "text/plain", HTTPStatus(status).phrase
    head = f"HTTP/1.1 {status} {message}\r\nConnection: close\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def has_body(req: Any) -> bool:
    """Tell whether a request brings a body, read or not."""
    return any(
        name == "TRANSFER-ENCODING" or (name == "CONTENT-LENGTH" and value.strip("0")) for name, value in req.headers
    )


worker_class = Worker
preload_app = True
control_socket_disable = True
loglevel = _settings.log_level
accesslog = "-" if _settings.log_level in ("debug", "info") else None
# client, time, request, status, body bytes, seconds, hosts asked (a>b: a redirected to b; a,b: b was asked after a)
access_log_format = '%({mirror.client}e)s %(t)s "%(m)s %({mirror.path}e)s" %(s)s %(B)s %(L)s %({mirror.upstream}e)s'
if _settings.cache_dir is not None:
    access_log_format += " %({x-cache}o)s"
limit_request_line = 8190  # bytes; nginx takes as many
# X-Forwarded-* is ProxyFix's alone (MIRROR_PROXIES), and nobody sets SCRIPT_NAME by a header.
forwarded_allow_ips = ""
forwarder_headers = ""


def pre_request(worker: Any, req: Any) -> None:
    """Say nothing: gunicorn's own hook would log each path for debug, and with it the secret one."""


def when_ready(server: Any) -> None:
    """Before the workers are forked: bound what a client may cost, and share all objects made so far.

    Connections have the options of their listener. The terminator at a Unix socket has a time limit of its own.
    """
    for listener in server.LISTENERS:
        if is_local(listener.sock):
            listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if listener.sock.family != socket.AF_UNIX:
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SEND_SECONDS * 1000)  # tcp(7)
    systemd.sd_notify(f"STATUS={what_is_served(server)}", server.log)
    app.extensions["docker-mirror"].telemetry.share()
    gc.collect()
    trim()
    gc.freeze()


def what_is_served(server: Any) -> str:
    """Return the line that ``systemctl status`` shows."""
    addresses = ", ".join(map(str, server.LISTENERS))
    workers = "1 worker" if server.num_workers == 1 else f"{server.num_workers} workers"
    return f"Serving {len(app.extensions['docker-mirror'].registries)} registries at {addresses} with {workers}"


def is_local(listener: socket.socket) -> bool:
    """Tell whether a listener is for this host only.

    There the bytes go to a terminator with no delay, and unbounded buffers would hold up to 1 MB for each slow client.
    Over a long line a bound would bound the rate.
    """
    if listener.family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def pre_exec(server: Any) -> None:
    """At SIGUSR2, before the next master is executed: let it be the one that is installed now.

    Its script names the Python of the version to which ``current`` leads; gunicorn would take the one of this process.
    From systemd it takes descriptors 3, 4, …, but has moved its own elsewhere; it is to inherit no others.
    """
    script = server.START_CTX["args"][1]
    if os.access(script, os.X_OK):
        server.START_CTX.update({0: script, "args": server.START_CTX["args"][1:]})
    if server.systemd:
        listeners = [listener.fileno() for listener in server.LISTENERS]
        spare = [fcntl.fcntl(listener, fcntl.F_DUPFD_CLOEXEC, 100) for listener in listeners]
        for listener in listeners:
            os.set_inheritable(listener, False)
        for number, descriptor in enumerate(spare, systemd.SD_LISTEN_FDS_START):
            os.dup2(descriptor, number)


def post_worker_init(worker: Any) -> None:
    """Serve: take over from the process before this one, and start the greenlets that look after memory and cache.

    A worker ends with its master, even by SIGKILL: systemd starts the next one when no process is left.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    take_over(worker)
    app.extensions["docker-mirror"].telemetry.join()
    gevent.spawn(trim_now_and_then)
    gevent.spawn(tidy_now_and_then)


def worker_exit(server: Any, worker: Any) -> None:
    """Let the next worker go on with all that this one counted."""
    app.extensions["docker-mirror"].tick()


def tidy_now_and_then() -> None:
    """Look after the cache, if there is one."""
    while True:
        app.extensions["docker-mirror"].tidy()
        gevent.sleep(TIDY_EVERY)


def take_over(worker: Any) -> None:
    """After SIGUSR2, let the master before this one finish its transfers and end, and tell systemd who serves now."""
    predecessor = os.environ.get("GUNICORN_PID")
    if predecessor:
        systemd.sd_notify(f"MAINPID={worker.ppid}", worker.log)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(predecessor), signal.SIGTERM)


def trim_now_and_then() -> None:
    """Give the memory of a burst back to the system (139 to 54 MB, measured).

    What is free goes back while other clients are served; and what idle connections hold, once no client has come for a
    while. Who only asks how the mirror does is no client.
    """
    mirror = app.extensions["docker-mirror"]
    seen = trimmed = 0
    while True:
        gevent.sleep(TRIM_EVERY)
        served = mirror.telemetry.requests
        if served != trimmed:
            if served == seen:
                mirror.close_idle()
                gc.collect()
                trimmed = served
            trim()
        seen = served


def trim() -> None:
    """Give free memory back to the system: malloc_trim(3), which musl has not."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
