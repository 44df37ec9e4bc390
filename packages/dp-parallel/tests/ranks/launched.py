"""A program as a user writes it: started by torchrun, joined by build_mesh, ended by finish."""

from __future__ import annotations

from veilspan.parallel import build_mesh, finish


def main() -> None:
    try:
        build_mesh()
    except ValueError as error:
        print(str(error).replace("\n", " ") + "\n", end="", flush=True)
    mesh = build_mesh(context=2)
    print(f"rank {mesh.context_rank} of {mesh.world_size}\n", end="", flush=True)
    finish()


if __name__ == "__main__":
    main()
