"""Power by the sensor of a Jetson's input, from a tree like its own."""

from pathlib import Path

import pytest

from gta_edge.machine.power import power_watts


def sensor(directory: Path, chip: str, **files: str) -> None:
    directory.mkdir(parents=True)
    for name, content in {"name": chip, **files}.items():
        (directory / name).write_text(f"{content}\n")


def test_the_whole_board_s_channel(tmp_path):
    sensor(tmp_path / "hwmon0", "thermal", in1_label="VDD_IN", in1_input="1", curr1_input="1")
    channels = {"in1_label": "VDD_CPU_GPU_CV", "in1_input": "19000", "curr1_input": "100"}
    channels |= {"in2_label": "VDD_IN", "in2_input": "19072", "curr2_input": "324"}
    sensor(tmp_path / "hwmon3", "ina3221", **channels)
    assert power_watts(tmp_path) == pytest.approx(19.072 * 0.324)


@pytest.mark.parametrize(
    "files", [{}, {"in1_label": "VDD_IN"}, {"in1_label": "VDD_IN", "in1_input": "", "curr1_input": "x"}]
)
def test_where_nothing_tells(tmp_path, files):
    assert power_watts(tmp_path / "missing") is None
    sensor(tmp_path / "hwmon0", "ina3221", **files)
    assert power_watts(tmp_path) is None
