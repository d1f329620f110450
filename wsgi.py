"""The entry of docker-mirror, and gunicorn's configuration: ``gunicorn -c python:wsgi -k gevent wsgi:app``.

gunicorn reads this module first, in its master process. The order matters: gevent patches before anything is imported
that opens a socket, the application is made once, its objects are frozen, and the workers are forked from it.
Bind address, workers, connections and timeouts are gunicorn's own options; here stands only what no option can say.
"""

from gevent import monkey

monkey.patch_all()

import ctypes
import gc
import ipaddress
import logging
import os
import socket
import sys
from typing import Any

import gevent

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

preload_app = True
control_socket_disable = True
loglevel = _settings.log_level
accesslog = "-" if _settings.log_level in ("debug", "info") else None
# client, time, request, status, body bytes, seconds, hosts asked (host>host: it was redirected)
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
            gc.collect()
            malloc_trim(0)
            trimmed = seen
        seen = worker.nr
