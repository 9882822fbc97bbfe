"""Nothing is sent, and nothing is written into a home directory but this package's own cache: by every command.

Libraries below could do either; so each command runs in a process of its own, with an empty home directory, and with a
library loaded before all others that notes who asks for a host's address or connects to one.
"""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gta_edge
from tests.helpers.chats import with_chat_template
from tests.helpers.commands import COMMAND, ROOT, environment

# Of C's functions and of Python's, which are called by them; a local socket is nobody else's business.
NOTES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

static void note(const char *what, const char *whom) {
    const char *path = getenv("NETWORK_NOTES");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file) { fprintf(file, "%s %s\n", what, whom ? whom : ""); fclose(file); }
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    note("getaddrinfo", node);
    return EAI_FAIL;
}

struct hostent *gethostbyname(const char *name) { note("gethostbyname", name); return NULL; }

static void note_address(const char *what, const struct sockaddr *address) {
    if (address && (address->sa_family == AF_INET || address->sa_family == AF_INET6)) note(what, "an address");
}

int connect(int socket, const struct sockaddr *address, socklen_t size) {
    note_address("connect", address);
    int (*next)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    return next(socket, address, size);
}

ssize_t sendto(int socket, const void *data, size_t size, int flags, const struct sockaddr *address, socklen_t length) {
    note_address("sendto", address);
    ssize_t (*next)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "sendto");
    return next(socket, data, size, flags, address, length);
}
"""

HIDDEN = ("ORT_DISABLE_TELEMETRY", "GTA_EDGE_CACHE", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")
"""Variables that would keep libraries silent, and that a user does not have."""

Run = Callable[..., list[str]]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that notes what goes to the network."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, to see what libraries in C ask of the network")
    directory = tmp_path_factory.mktemp("notes")
    (directory / "notes.c").write_text(NOTES)
    library = directory / "notes.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, directory / "notes.c", "-ldl"], check=True)
    return library


@pytest.fixture
def alone(notes: Path, tmp_path: Path) -> Run:
    """Run a command line in a new home; return what it left there and in TMPDIR, and what it asked of the network."""

    def run(*command: object) -> list[str]:
        home, log, temporary = tmp_path / "home", tmp_path / "notes", tmp_path / "temporary"
        home.mkdir()
        temporary.mkdir()
        kept = {
            name: value for name, value in environment().items() if name not in HIDDEN and not name.startswith("XDG_")
        }
        variables = {"HOME": str(home), "TMPDIR": str(temporary), "LD_PRELOAD": str(notes), "NETWORK_NOTES": str(log)}
        done = subprocess.run(
            [*map(str, command)], env=kept | variables, cwd=home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        left = sorted(str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir())
        asked = log.read_text().splitlines() if log.exists() else []
        left = [name for name in left if not name.startswith(".cache/gta_edge/")]
        return [*left, *(path.name for path in temporary.iterdir()), *asked]

    return run


@pytest.fixture(scope="module")
def places(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("private")
    (directory / "text").write_text("A text to evaluate. " * 20)
    return {
        "checkpoint": tiny_checkpoint,
        "bundle": with_chat_template(tiny_bundle, directory / "bundle"),
        "text": directory / "text",
        "out": directory,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        "init gta1-160m {out}/new --layers 1 --max-length 32",
        "export {checkpoint} {out}/exported --precision int4",
        "inspect {bundle}",
        "verify {bundle} --checkpoint {checkpoint}",
        "eval {bundle} --text {text}",
        "generate {bundle} --prompt hello --max-new-tokens 2",
        "chat {bundle} --json",
        "serve {bundle} --unit",
        "bench {bundle} --contexts 4 --new-tokens 2 --rounds 1 --backend onnxruntime --plot {out}/bench.svg",
        "plan {bundle} --plot {out}/plan.png",
        "doctor",
        "build {bundle} --onnx-only",
        "calibrate-cache {bundle} --text {text} --windows 1 --tokens 96 --backend torch",
    ],
)
def test_a_command_keeps_to_itself(alone: Run, places: dict[str, Path], arguments: str) -> None:
    assert alone(*COMMAND, *(word.format(**places) for word in arguments.split())) == []


def test_every_command_is_tried() -> None:
    from gta_edge.cli.app import VERBS

    tried = {
        mark.args[1][i].split()[0] for mark in test_a_command_keeps_to_itself.pytestmark for i in range(len(VERBS))
    }
    assert tried == set(VERBS)


def test_what_would_be_seen(alone: Run, tmp_path: Path) -> None:
    script = """
import pathlib, socket
pathlib.Path.home().joinpath("written").write_text("")
for call in (lambda: socket.getaddrinfo("a.host", 80), lambda: socket.create_connection(("127.0.0.1", 9), 0.1)):
    try:
        call()
    except OSError:
        pass
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("127.0.0.1", 9))
"""
    found = alone(sys.executable, "-c", script)
    assert {"written", "getaddrinfo a.host", "getaddrinfo 127.0.0.1", "sendto an address"} <= set(found)


def test_onnxruntime_is_silent_before_it_is_imported() -> None:
    script = """
import os
from gta_edge.libraries.optional import optional
os.environ["ORT_DISABLE_TELEMETRY"] = "0"
optional("gta_edge_not_there", "ort")
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout == "1\n"


def test_nobody_imports_it_past_that() -> None:
    """All of the package goes through ``optional``, which turns its events off first."""
    for path in sorted(Path(gta_edge.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("onnxruntime") for name in names), path
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        text = path.read_text()
        if "onnxruntime_genai" in text.replace("onnxruntime-genai", ""):
            assert "ORT_DISABLE_TELEMETRY" in text, path


def test_these_tests_are_silent_too() -> None:
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
