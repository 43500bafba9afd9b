"""The processes that these tests are made of."""

from support.browser import browser, tab  # noqa: F401
from support.clients import client  # noqa: F401
from support.daemons import daemon, runtime, start_daemon  # noqa: F401
from support.mounts import mounts  # noqa: F401
from support.prometheus import prometheus  # noqa: F401
from support.systemd_host import host, host_nursery, service, users  # noqa: F401
from support.trainers import nursery, trainers  # noqa: F401
