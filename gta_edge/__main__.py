"""``python -m gta_edge`` is ``gta-edge``."""

from gta_edge.cli import main

if __name__ == "__main__":
    main()
