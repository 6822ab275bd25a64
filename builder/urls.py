"""URLs in the form in which they are fetched, made once, at the source: tombstones name what is asked for."""

from __future__ import annotations

import re

import yarl

MAX_CHARACTERS = 8192
_EDGES = "".join(map(chr, range(0x21)))  # what yarl, and the URL standard, take off both ends
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # a tab is taken out by yarl
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]{2,}")


def as_fetched(found: str) -> tuple[str, str | None]:
    """The URL to ask for, as yarl writes it, with its host in lower case ASCII (IDNA), and why it cannot be.

    A second time changes nothing more. Where it cannot be asked for, the text comes back without control
    characters.
    """
    text = found.strip(_EDGES)
    try:
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"over {MAX_CHARACTERS} characters")
        if _CONTROL.search(text):
            raise ValueError("a control character in the URL")
        url = yarl.URL(text)
        host = url.raw_host or ""
        if url.scheme not in ("http", "https") or not _HOST.fullmatch(host):
            raise ValueError("not an http or https URL")
        host.encode("idna")  # labels of 1 to 63 characters
        return str(url), None
    except (ValueError, IndexError) as error:  # the latter: yarl, of a host that is `[]`
        rest = re.sub(r"[\x00-\x1f\x7f-\x9f]+", "", text)
        return as_fetched(rest)[0] if rest != text else text, str(error)


def domain(named: str) -> str:
    """The host, or its end, that somebody names, in the form of a fetched URL; empty where it is none."""
    text = named.strip(_EDGES).removeprefix("*.")
    address = f"[{text}]" if text.count(":") > 1 and "[" not in text and "://" not in text else text
    url, error = as_fetched(address if "://" in address else f"http://{address}")
    if error:
        return "" if re.search(r"[/*:\[\]]", text) else text.lower().strip(".")
    host = yarl.URL(url).raw_host or ""
    return f"[{host}]" if ":" in host else host.strip(".")
