"""The decoder blocks of a model, found by structure."""

from __future__ import annotations

from torch import nn


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the list of repeated blocks that holds most of the parameters.

    Lists inside blocks (experts, adapters) hold fewer, so this is the decoder's own list, also
    below the wrappers of PEFT.

    Args:
        model: Any model whose blocks are the items of one `nn.ModuleList`.

    Returns:
        That list.

    Raises:
        ValueError: If there is no such list, or two blocks share a parameter.

    Examples:
        >>> blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        >>> len(decoder_blocks(nn.Sequential(nn.Embedding(8, 4), blocks)))
        2
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and _size(m) > 0]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList with parameters, so its decoder blocks "
            "cannot be found; pass a decoder whose blocks are the items of one ModuleList."
        )
    blocks = max(lists, key=_size)
    seen: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            first = seen.setdefault(id(parameter), index)
            if first != index:
                raise ValueError(
                    f"the blocks {first} and {index} share the parameter {name}; blocks are "
                    "sharded one by one and cannot share parameters. Give each block parameters of "
                    "its own."
                )
    return blocks


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
