"""Who may read over HTTP: a request names this endpoint as its host and, where a token is set, shows it.

Invariant: what listens on an address that others can reach has a token.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from ckptd.daemon.settings.config import Config, parse_address
from ckptd.protocol.errors import BadConfig

TOKEN_VARIABLE: Final = "CKPTD_HTTP_TOKEN"
# 16 random characters of base64 are 96 bits: not to be guessed over a network.
_TOKEN: Final = re.compile(r"[!-~]{16,512}")
_BAD_TOKEN: Final = "an HTTP token has 16 to 512 visible ASCII characters, for instance those of `openssl rand -hex 32`"
# These say nothing but yes or no, and are asked by what starts and watches services.
OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})


@dataclass(frozen=True)
class Access:
    """Who may read, as configured.

    Attributes:
        token: What a request must show; None asks for nothing, and is refused where others can reach the address.
        hosts: Names under which the endpoint is known besides its own, with whatever port: a proxy has its own.
    """

    token: str | None = None
    hosts: Collection[str] = ()


@dataclass(frozen=True)
class Gate:
    """The rules of one endpoint.

    Attributes:
        port: The bound port.
        names: The host as configured and as bound.
        access: Who may read.
    """

    port: int
    names: Collection[str]
    access: Access = Access()

    @property
    def token(self) -> str | None:
        """What must be shown; None: nothing."""
        return self.access.token

    @property
    def cookie_name(self) -> str:
        """Name of the cookie; browsers keep those of all ports of a host together."""
        return f"ckptd-{self.port}"

    @property
    def cookie(self) -> str:
        """Value of the cookie: proves that its bearer has shown the token, and does not hold it."""
        return hmac.new((self.token or "").encode(), b"ckptd page", hashlib.sha256).hexdigest()

    def names_us(self, hosts: list[str]) -> bool:
        """Say whether a request's Host headers, which must be one, name this endpoint."""
        if len(hosts) != 1:
            return False
        known = re.sub(r":\d+$", "", hosts[0]).lower() in self.access.hosts
        return known or is_our_host(hosts[0], port=self.port, names=self.names)

    def admits(self, request: web.Request) -> bool:
        """Say whether a request may be answered: it shows the token or our cookie, or needs none."""
        if self.token is None or request.path in OPEN_PATHS:
            return True
        scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _equal(shown.strip(), self.token):
            return True
        return _equal(request.cookies.get(self.cookie_name, ""), self.cookie)

    def is_entered_by(self, request: web.Request) -> bool:
        """Say whether a request brings the right ``?token=``, for which a browser gets our cookie."""
        return self.token is not None and _equal(request.query.get("token", ""), self.token)


def is_our_host(header: str, *, port: int, names: Collection[str]) -> bool:
    """Say whether a Host header names this endpoint.

    Args:
        header: Value of the header; a missing port means 80.
        port: The bound port.
        names: The host as configured and as bound. If one is a wildcard (0.0.0.0 or ::), every literal IP
            and this node's name are ours too, or no other node could scrape: a rebinding page always comes
            with a name of its own.
    """
    try:
        host, asked_port = parse_address(header if re.search(r":\d+$", header) else f"{header}:80")
    except BadConfig:
        return False
    host = host.lower()
    if asked_port != port:
        return False
    if host == "localhost" or host in names:
        return True
    wildcard = any(ip.is_unspecified for ip in map(_literal_ip, names) if ip)
    if ip := _literal_ip(host):
        return ip.is_loopback or wildcard
    return wildcard and host == socket.gethostname().lower()


def load_access(config: Config) -> Access:
    """Return who may read. Raises BadConfig as :func:`load_token` does."""
    return Access(load_token(config), frozenset(host.lower() for host in config.http_hosts))


def load_token(config: Config) -> str | None:
    """Return the token of CKPTD_HTTP_TOKEN, or of the configured file; None where neither is set.

    The variable is taken out of the environment: workers, which run users' code, inherit what is left.

    Raises:
        BadConfig: The file cannot be read, or what is set is no token.
    """
    token = os.environ.pop(TOKEN_VARIABLE, "")
    where = TOKEN_VARIABLE
    if not token and config.http_token_file:
        where = config.http_token_file
        try:
            token = Path(where).read_text("ascii").strip()
        except OSError as error:
            raise BadConfig(where, f"{error.strerror}; correct http_token_file") from None
        except ValueError:
            raise BadConfig(where, _BAD_TOKEN) from None
    elif not token:
        return None
    if not _TOKEN.fullmatch(token):
        raise BadConfig(where, _BAD_TOKEN)
    return token


def check_exposure(address: str, bound: str, token: str | None) -> None:
    """Raise BadConfig if others than this machine can reach the bound IP address, and no token is set."""
    ip = _literal_ip(bound)
    if token is None and not (ip is not None and ip.is_loopback):
        remedy = f"set http_token_file or {TOKEN_VARIABLE}, or listen on 127.0.0.1"
        raise BadConfig(address, f"other machines could read this address without a token; {remedy}")


def _equal(shown: str, wanted: str) -> bool:
    """Compare in a time that does not tell how much of it is right."""
    return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), wanted.encode())


def _literal_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
