"""Train Llama-class models with differential privacy on long documents.

The public interface is the command line, `python -m veilspan.trainer`.
"""

__all__: list[str] = []
