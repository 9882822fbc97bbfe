"""Directories with what Linux would say on some machine."""

from pathlib import Path

from gta_edge.support.memory import available_bytes, reachable_bytes, total_bytes


class Machine:
    """A directory with what a process of this machine would see in /proc and /sys/fs/cgroup."""

    def __init__(self, directory: Path) -> None:
        self.proc, self.mount = directory / "proc", directory / "sys" / "fs" / "cgroup"
        self.proc.mkdir()
        self.mount.mkdir(parents=True)
        self.meminfo = self.proc / "meminfo"
        self.meminfo.write_text("MemTotal:  8388608 kB\nMemFree:  200 kB\nMemAvailable:    5242880 kB\n")
        self.lines: list[str] = []

    def is_in(self, path: str, controllers: str = "", root: str = "/", mount: str = "") -> None:
        """Put the process into a group; ``controllers`` are those of a tree of version 1, none of version 2."""
        place = self.mount / mount
        kind, options = ("cgroup", f"rw,{controllers}") if controllers else ("cgroup2", "rw")
        line = f"31 23 0:28 {root} {str(place).replace(' ', chr(92) + '040')} rw shared:9 - {kind} {kind} {options}\n"
        with (self.proc / "mountinfo").open("a") as file:
            file.write("22 1 8:1 / / rw - ext4 /dev/sda rw\nnonsense\n" + line)
        with (self.proc / "cgroup").open("a") as file:
            file.write(f"{'4' if controllers else '0'}:{controllers}:{path}\n")

    def group(self, path: str, **files: object) -> None:
        directory = self.mount / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name.replace("__", ".")).write_text(f"{content}\n")

    def available(self) -> int | None:
        return available_bytes(self.meminfo, self.proc)

    def reachable(self) -> int | None:
        return reachable_bytes(self.meminfo, self.proc)

    def total(self) -> int | None:
        return total_bytes(self.meminfo, self.proc)
