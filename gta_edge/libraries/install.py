"""The line that installs an extra of this package, in the form by which the package itself was installed.

The package need not be on any index: it may be of a clone, a wheel file or a repository. The installer writes down
which (``direct_url.json``, PEP 610; there is none where it came from an index).
"""

from __future__ import annotations

import json
import shlex
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

__all__ = ["DISTRIBUTION", "install_command", "reinstall_command", "requirement"]

DISTRIBUTION = "gta-edge"
"""What pip calls this package."""

_SOURCE = Path(__file__).parents[2]
_OF_URLS = "%:/?#@!&*+,="  # reserved characters that pip takes as they are; what is quoted already stays
_VCS = ("git", "hg", "svn", "bzr")


def install_command(extra: str, *, upgrade: str = "", pip: str = "pip") -> str:
    """Return the command that installs an extra of this package; printable, and quoted for a shell.

    Args:
        extra: its name in ``pyproject.toml``; several with commas.
        upgrade: a distribution of the extra that is to be replaced by its newest release, too. pip leaves what an extra
            brings as it is where that suffices.
        pip: what pip is run as.
    """
    options = ["--upgrade"] if upgrade else []
    return " ".join([pip, "install", *options, *_quoted(extra), *([upgrade] if upgrade else [])])


def reinstall_command(extra: str = "") -> str:
    """Return the command that installs this package again, with all that it needs, and what an extra brings."""
    return " ".join(["pip", "install", "--upgrade", "--force-reinstall", *_quoted(extra)])


def requirement(direct_url: str | None, extra: str = "") -> list[str]:
    """Return what pip is to be given: ``["gta-edge[ort]"]``, ``["-e", "/path/to/clone[ort]"]``.

    The first form is also for a source that is gone, or cannot be printed, and for what is not as installers write it:
    pip then takes the package that is installed.

    Args:
        direct_url: the content of ``direct_url.json``, None where there is none.
        extra: as ``install_command`` takes it, or empty.
    """
    extras = f"[{extra}]" if extra else ""
    try:
        return _form(json.loads(direct_url), extras) if direct_url else [f"{DISTRIBUTION}{extras}"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError):
        return [f"{DISTRIBUTION}{extras}"]


def _quoted(extra: str) -> list[str]:
    return [shlex.quote(word) for word in requirement(_direct_url(), extra)]


def _form(document: dict[str, Any], extras: str) -> list[str]:
    """Return what a document of PEP 610 tells.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OSError: it is none, or its directory or file is not there.
    """
    url = document["url"]
    path = _local_path(url)
    if "dir_info" in document and path:
        if document["dir_info"].get("editable") is True:
            return ["-e", f"{_printable(path)}{extras}"]
    elif "vcs_info" in document and not path:  # older releases of pip do not read git+file: in this form
        vcs = document["vcs_info"]
        if vcs["vcs"] not in _VCS:
            raise ValueError
        url = f"{vcs['vcs']}+{url}@{vcs.get('requested_revision') or vcs['commit_id']}"
    elif "archive_info" not in document:
        raise ValueError
    if subdirectory := document.get("subdirectory"):
        url = f"{url}#subdirectory={subdirectory}"
    # quoted, since pip ends a URL at a space or semicolon, and a terminal obeys what is not printable
    return [f"{DISTRIBUTION}{extras} @ {quote(url, safe=_OF_URLS)}"]


def _local_path(url: str) -> str | None:
    """Return the path of a file URL, None for a URL of another kind.

    Raises:
        ValueError, OSError: there is nothing.
    """
    parts = urlsplit(url)
    if parts.scheme != "file":
        return None
    path = unquote(parts.path, errors="strict")
    if not Path(path).exists():
        raise ValueError
    return path


def _printable(path: str) -> str:
    """Return a path that one line of a message can hold as it is.

    Raises:
        ValueError: it has line breaks, several spaces in a row, or what a terminal would obey.
    """
    if not path.isprintable() or " ".join(path.split()) != path:
        raise ValueError
    return path


@cache
def _direct_url() -> str | None:
    """Return what the installer wrote down, or the same for a source that runs without being installed."""
    try:
        return distribution(DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:
        if (_SOURCE / "pyproject.toml").is_file():
            return json.dumps({"url": _SOURCE.as_uri(), "dir_info": {"editable": True}})
    except (OSError, ValueError):  # damaged: not readable, not text
        pass
    return None
