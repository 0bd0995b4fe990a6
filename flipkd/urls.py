"""URLs as messages show them: the keys and passwords that may stand in one are for nobody who reads a log."""

from __future__ import annotations

import re

# KEY:SECRET@ before a host (not the : of a port); a secret with a slash too, which nothing opens and messages quote.
_USER = re.compile(r"^[^/@]*:(?!\d+(?:/|$))(?:[^/]*@|[^@]*@)")
_SECRET = re.compile(r"((?:^|&)[^=&]*(?:key|secret|token|password|sig)[^=&]*=)[^&]*", re.IGNORECASE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")


def without_secrets(address: str) -> str:
    """A URL as messages show it: ``s3://KEY:SECRET@bucket/a?secret_key=S`` is ``s3://***@bucket/a?secret_key=***``.

    A local path stays as it is.
    """
    scheme, mark, rest = address.partition("://")
    if not mark:
        return address
    place, query_mark, query = rest.partition("?")
    return scheme + mark + _USER.sub("***@", place) + query_mark + _SECRET.sub(r"\1***", query)


def hide_secrets(message: str) -> str:
    """A message in which every URL stands as ``without_secrets`` gives it."""
    return _URL.sub(lambda found: without_secrets(found.group()), message) if "://" in message else message
