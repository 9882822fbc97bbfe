"""The backends ``tensorrt`` and ``tensorrt-rtx``: building engines and running them."""
