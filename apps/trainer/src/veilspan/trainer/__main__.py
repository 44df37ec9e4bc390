"""`python -m veilspan.trainer`."""

from veilspan.trainer.cli import app

if __name__ == "__main__":
    app(prog_name="python -m veilspan.trainer")
