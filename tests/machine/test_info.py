"""What a machine says of itself; its files and commands are stood in for where this one is no Jetson."""

import os
import re
from pathlib import Path

import pytest

from gta_edge.machine import info as machine
from gta_edge.machine.jetpack import jetpacks


def test_this_machine() -> None:
    found = machine.describe()
    assert found["cores"] == os.cpu_count()
    assert 0 < found["usable_cores"] <= found["cores"]
    assert 2**26 < found["memory_bytes"] <= found["installed_bytes"]
    assert found["available_bytes"] > 0
    assert found["clocks_hz"].keys() == {"gpu", "cpu", "memory"}
    assert machine.package_versions()["numpy"]


@pytest.mark.parametrize(("least", "most", "fixed"), [("918000000", "918000000", True), ("1", "918000000", False)])
def test_clocks(tmp_path: Path, least: str, most: str, fixed: bool) -> None:
    assert machine.clocks_fixed(tmp_path) is None
    device = tmp_path / "17000000.gpu"
    device.mkdir()
    assert machine.clocks_fixed(tmp_path) is None
    (device / "min_freq").write_text(f"{least}\n")
    (device / "max_freq").write_text(f"{most}\n")
    assert machine.clocks_fixed(tmp_path) is fixed


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_clocks_in_hertz(tmp_path: Path) -> None:
    gpu, cpu, emc = tmp_path / "devfreq" / "17000000.gpu", tmp_path / "cpu" / "cpu0" / "cpufreq", tmp_path / "emc"
    places = {"devfreq": gpu.parent, "cpus": tmp_path / "cpu", "emc": emc}
    nothing = machine.clocks_hz(**places)
    assert nothing == {"gpu": None, "cpu": None, "memory": None}
    assert machine.clocks_text(nothing) == "GPU not known; CPU not known; memory not known"
    for name, hz in (("min", 306000000), ("max", 918000000), ("cur", 612000000)):
        write(gpu / f"{name}_freq", f"{hz}")
    write(cpu / "scaling_max_freq", "1510400")  # in kHz
    write(cpu / "scaling_cur_freq", "<unknown>")
    write(emc / "rate", "3199000000")
    found = machine.clocks_hz(**places)
    assert found == {
        "gpu": {"min": 306_000_000, "max": 918_000_000, "now": 612_000_000},
        "cpu": {"min": None, "max": 1_510_400_000, "now": None},
        "memory": {"min": None, "max": None, "now": 3_199_000_000},
    }
    assert machine.clocks_text(found) == (
        "GPU 306 to 918 MHz, now 612; CPU ? to 1510 MHz, now ?; memory ? to ? MHz, now 3199"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_clock_that_only_root_may_read_is_not_known(tmp_path: Path) -> None:
    write(tmp_path / "emc" / "rate", "3199000000")
    (tmp_path / "emc").chmod(0)
    try:
        assert machine.clocks_hz(tmp_path, tmp_path, tmp_path / "emc")["memory"] is None
    finally:
        (tmp_path / "emc").chmod(0o700)


@pytest.mark.parametrize(
    ("changes", "jetson"),
    [
        ({}, False),
        ({"board": "Raspberry Pi 5 Model B Rev 1.0"}, False),
        ({"board": "NVIDIA Jetson Orin Nano Developer Kit"}, True),
        ({"board": "NVIDIA Orin NX", "jetson_linux": "# R36 (release), REVISION: 4.3"}, True),
        ({"jetpack": "6.2+b77"}, True),
    ],
)
def test_what_is_a_jetson(changes: dict[str, str], jetson: bool) -> None:
    assert machine.is_jetson({"board": None, "jetson_linux": None, "jetpack": None} | changes) is jetson


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of commands that are found first."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def command(directory: Path, name: str, output: str, status: int = 0) -> None:
    (directory / name).write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {status}\n")
    (directory / name).chmod(0o755)


def test_commands_of_a_jetson(commands: Path) -> None:
    command(commands, "nvpmodel", "NV Power Mode: MAXN_SUPER\n2")
    command(commands, "nvidia-smi", "Orin (nvgpu), 540.4.0, [N/A]")
    command(commands, "nvcc", "Cuda compilation tools, release 12.6, V12.6.68")
    command(commands, "dpkg-query", "6.2+b77")
    assert machine.power_mode() == "MAXN_SUPER"
    assert machine.gpus() == [{"name": "Orin (nvgpu)", "driver": "540.4.0", "memory": "[N/A]"}]
    assert machine.cuda_toolkit() == "12.6"
    assert machine.describe()["jetpack"] == "6.2+b77"


@pytest.mark.parametrize("status", [0, 9])
@pytest.mark.parametrize(
    "text",
    [
        "No devices were found",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
        "NVIDIA driver is installed and running.",
        "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570.86",
        "Unable to determine the device handle for GPU0: 0000:01:00.0: Unknown Error",
        "error, error, error",
        "",
    ],
)
def test_nvidia_smi_that_lists_no_gpu(commands: Path, text: str, status: int) -> None:
    command(commands, "nvidia-smi", text, status)
    assert machine.gpus() == []


def test_nvidia_smi_with_a_name_of_several_words(commands: Path) -> None:
    command(commands, "nvidia-smi", "NVIDIA H100, PCIe, 570.86.15, 81559 MiB\nNo devices were found")
    assert machine.gpus() == [{"name": "NVIDIA H100, PCIe", "driver": "570.86.15", "memory": "81559 MiB"}]


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: MODE_15W\n2", "MODE_15W"),
        ("NVPM ERROR: failed to open /var/lib/nvpmodel/status\nNVPM ERROR: optMask is 2, no request", None),
        ("NVPM ERROR: Error opening /etc/nvpmodel.conf: No such file or directory", None),
        ("NV Power Mode:", None),
        ("2", None),
        ("\x1b[31mNV Power Mode: \x1b[0m", None),
    ],
)
def test_nvpmodel_that_names_a_mode_or_none(commands: Path, text: str, mode: str | None) -> None:
    command(commands, "nvpmodel", text)
    assert machine.power_mode() == mode


def test_dpkg_that_has_no_version(commands: Path) -> None:
    command(commands, "dpkg-query", "dpkg-query: no packages found matching nvidia-jetpack")
    assert machine.describe()["jetpack"] is None


RELEASE = (
    "# R{} (release), REVISION: {}, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025"
)


@pytest.mark.parametrize(
    ("major", "revision", "expected"),
    [
        (36, "4.0", "6.1"),
        (36, "4.3", "6.2"),
        (36, "4.4", "6.2.1"),
        (36, "4.7", "6.2.1"),
        (36, "5.0", "6.2.2"),
        (36, "5.2", "6.2.3"),
        (38, "2.0", "7.0"),
        (38, "4.0", "7.1"),
        (39, "2.0", "7.2"),
        (39, "2.1", "7.2.1"),
        (39, "2.2", "7.2.2"),
        (36, "4.30", None),  # not 4.3
        (36, "4.9", None),  # a later one: not guessed
        (136, "4.3", None),
        (40, "1.0", None),
    ],
)
def test_jetpack_by_jetson_linux(
    commands: Path, tmp_path: Path, major: int, revision: str, expected: str | None
) -> None:
    command(commands, "dpkg-query", "dpkg-query: no packages found matching nvidia-jetpack", status=1)
    write(tmp_path / "nv_tegra_release", RELEASE.format(major, revision) + "\n# KERNEL_VARIANT: oot")
    assert machine.jetpack(tmp_path / "nv_tegra_release") == expected
    command(commands, "dpkg-query", "6.2+b77")  # where there is that package, it knows
    assert machine.jetpack(tmp_path / "nv_tegra_release") == "6.2+b77"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"# R36 (release)",
        b"# R36 (release), REVISION: ",
        b"# R36 (release), REVISION: 4",
        b"# R36 (release), REVISION: 4.x",
        b"# R" + b"9" * 5000 + b" (release), REVISION: 4.3",
        "# R36 (release), REVISION: \u0664.\u0663".encode(),  # digits, of another script
        b"\xff\xfe# R36 (release), REVISION: 4.3",
        b"\0" * 64,
    ],
)
def test_a_damaged_release_file(commands: Path, tmp_path: Path, content: bytes) -> None:
    command(commands, "dpkg-query", "", status=1)
    (tmp_path / "nv_tegra_release").write_bytes(content)
    assert machine.jetpack(tmp_path / "nv_tegra_release") is None
    assert machine.jetpack(tmp_path / "none") is None
    assert machine.jetpack(tmp_path) is None  # a directory


def test_commands_that_fail(commands: Path) -> None:
    for name in ("nvpmodel", "nvidia-smi", "nvcc", "dpkg-query"):
        command(commands, name, "NVIDIA-SMI has failed", status=9)
    assert (machine.power_mode(), machine.gpus(), machine.cuda_toolkit()) == (None, [], None)
    assert machine.describe()["jetpack"] is None


def test_cpu_clock_and_caches(tmp_path: Path) -> None:
    assert (machine.cpu_governor(tmp_path), machine.cpu_cache_bytes(tmp_path)) == (None, None)
    for i, governor in enumerate(("schedutil", "performance", "schedutil")):
        (tmp_path / f"cpu{i}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{i}" / "cpufreq" / "scaling_governor").write_text(f"{governor}\n")
    for i, size in enumerate(("32K", "2M", "1024K", "many")):
        (tmp_path / "cpu0" / "cache" / f"index{i}").mkdir(parents=True)
        (tmp_path / "cpu0" / "cache" / f"index{i}" / "size").write_text(f"{size}\n")
    assert machine.cpu_governor(tmp_path) == "performance, schedutil"
    assert machine.cpu_cache_bytes(tmp_path) == 2 * 2**20


JETSON = {
    "board": "NVIDIA Jetson Orin Nano Developer Kit",
    "jetson_linux": "# R36 (release), REVISION: 4.3",
    "power_mode": "MAXN",
    "clocks_fixed": True,
}


@pytest.mark.parametrize(
    ("changes", "load", "words"),
    [
        ({}, 0.1, []),
        ({"clocks_fixed": True, "cpu_governor": "schedutil"}, 0.1, []),
        (JETSON, 0.1, []),
        (JETSON | {"clocks_fixed": False}, 0.1, ["sudo jetson_clocks"]),
        (JETSON | {"power_mode": None}, 0.1, ["nvpmodel"]),
        (JETSON | {"power_mode": None, "clocks_fixed": False}, 0.1, ["sudo jetson_clocks", "nvpmodel"]),
        ({"board": "Radxa ROCK 5B", "clocks_fixed": False}, 0.1, []),  # another kind of GPU, and no such commands
        ({"cpu_governor": "schedutil"}, 0.1, ["(schedutil)"]),
        ({"cpu_governor": "performance"}, 0.1, []),
        ({}, 3.25, ["3.2 of 8 cores"]),
        ({}, 17.0, ["all 8 cores busy, and more waiting"]),
        ({"usable_cores": 1}, 1.9, []),  # of eight: there are cores to spare
        ({"usable_cores": 1}, 7.0, ["7.0 of 8 cores"]),  # the load is the machine's
        ({"usable_cores": 1, "cores": 2}, 7.0, ["all 2 cores"]),
    ],
)
def test_what_makes_times_vary(changes: dict[str, object], load: float, words: list[str]) -> None:
    keys = ("clocks_fixed", "board", "jetpack", "jetson_linux", "power_mode", "cpu_governor")
    found = machine.timing_warnings(dict.fromkeys(keys) | {"usable_cores": 8, "cores": 8} | changes, load)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


def test_the_docs_have_the_same_jetpacks() -> None:
    page = (Path(__file__).parents[2] / "docs" / "jetson" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d\d\.[\d., ]+) \| (\d\.[\d.]+) \|", page, re.MULTILINE)
    assert {release: jetpack for releases, jetpack in rows for release in releases.split(", ")} == jetpacks()
