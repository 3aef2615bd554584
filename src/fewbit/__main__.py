"""``python -m fewbit`` is the same as ``fewbit``."""

from .cli.main import run

if __name__ == "__main__":
    run()
