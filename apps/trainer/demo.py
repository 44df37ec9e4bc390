"""Train a small Llama privately on the standard library of this Python, then let it write a line.

Two processes on the CPU share each sequence. Arguments are handed to the trainer, for example
`--set privacy.steps=20`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from datetime import datetime
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parent / "recipes" / "demo-stdlib.toml"
PROMPT = "def "


def main() -> None:
    """Train, then load the exported model as any user would."""
    folder = Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    began = time.monotonic()
    print("Training a Llama from scratch on the Python standard library; this takes minutes.\n")
    train(folder, sys.argv[1:])
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print(f"\nTrained and evaluated in {minutes} min {seconds} s.")
    print(f"\nThe exported model, loaded with AutoModelForCausalLM, continues {PROMPT!r}:\n")
    print(f"  {generate(folder / 'model')!r}\n")
    print("Few steps and much noise make no programmer; the loss above is what it learned.")
    print(f"Report for a privacy officer: {(folder / 'report.html').resolve()}")


def train(folder: Path, arguments: list[str]) -> None:
    """Start the trainer on two processes, as `torchrun` does."""
    settings = {"data.train": sysconfig.get_path("stdlib"), "run.folder": str(folder)}
    overrides = [text for item in settings.items() for text in ("--set", "=".join(item))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    # A port of its own for each start: two demos on one machine must not meet.
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    trainer = ["-m", "veilspan.trainer", "train", str(RECIPE), *overrides, *arguments]
    done = subprocess.run([*launcher, *trainer], env={"OMP_NUM_THREADS": "1", **os.environ})
    if done.returncode:
        raise SystemExit(done.returncode)


def generate(model_folder: Path) -> str:
    """Return what the exported model writes after the prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7)
    return tokenizer.decode(output[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
