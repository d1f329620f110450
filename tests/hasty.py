"""gunicorn's configuration for tests of time limits: wsgi.py's own, but that no client gets much time.

gunicorn -c python:tests.hasty wsgi:app
"""

import wsgi
from wsgi import *  # noqa: F403

wsgi.HEAD_SECONDS = 1
wsgi.SEND_SECONDS = 1
