"""Directories that commands have made, and outputs that fail on the way."""

import json

from gta_edge.support.files import new_directory


def old_directory(path):
    """A directory as a command may have made it earlier."""
    path.mkdir()
    (path / "config.json").write_text("old")
    record = {"format": "gta-edge-checkpoint", "files": {"config.json": {"bytes": 3}}}
    (path / "gta_edge_checkpoint.json").write_text(json.dumps(record))
    return path


def fail_within(path, error, opener=new_directory, **options):
    with opener(path, **options) as partial:
        if partial.is_dir():
            (partial / "deep").mkdir()
            (partial / "deep" / "file").write_text("half")
        else:
            partial.write_text("half")
        raise error


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)
