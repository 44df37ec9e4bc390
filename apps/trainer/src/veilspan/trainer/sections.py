"""Sections of a recipe: every key with its type, default, allowed values and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, field_validator, model_validator

from veilspan.trainer.recipe_section import Section
from veilspan.trainer.recipe_toml import dumps


class Lora(Section):
    """Train low-rank adapters and freeze everything else (`[model.lora]`)."""

    rank: int = Field(default=8, ge=1, description="Rank of each adapter.")
    alpha: float = Field(default=16.0, gt=0, description="Scale: an adapter adds alpha/rank · B·A.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        default="all-linear", description="Module names to adapt, as in PEFT."
    )


class Model(Section):
    """What is trained (`[model]`): a local folder, or a configuration to start from scratch."""

    path: Path | None = Field(
        default=None, description="Local Hugging Face model folder with safetensors weights."
    )
    config: dict[str, Any] | None = Field(
        default=None,
        description="Configuration of a model to start from scratch: model_type and the keys of "
        "that Hugging Face configuration. vocab_size defaults to the tokenizer's.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Number format of forward and backward and of frozen weights. Trained "
        "parameters, clipped sums and noise are always float32.",
    )
    lora: Lora | None = Field(
        default=None, description="Adapters; leave out to train every parameter."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of path and config")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError('config needs model_type, for example model_type = "llama"')
        for key, value in (self.config or {}).items():
            try:
                dumps({key: value})
            except TypeError as error:
                raise ValueError(
                    f"config.{key} is {value!r}, which a recipe file cannot hold; leave it out for "
                    "the model's default, or give texts, numbers, truth values, lists or tables"
                ) from error
        return self


class Data(Section):
    """What is learned from (`[data]`), and what one protected unit of it is."""

    train: Path = Field(description="File or folder with the private training data.")
    name: str | None = Field(
        default=None,
        pattern=r"\S",
        description="Name of the data set, the same in all runs on it, for the ledger: those of "
        "one name are summed up, of two names never.",
    )
    format: Literal["auto", "text", "jsonl", "parquet", "dataset"] = Field(
        default="auto",
        description="text: one file is one row. jsonl, parquet: one line or table row is one row. "
        "dataset: folder written by datasets.Dataset.save_to_disk. auto: by the ending.",
    )
    pattern: str | None = Field(
        default=None,
        description="Files to read inside a folder, such as **/*.py; default by format.",
    )
    exclude: tuple[str, ...] = Field(default=(), description="Files to leave out, as patterns.")
    text_column: str = Field(default="text", description="Column that holds the text.")
    unit: Literal["record", "document", "user"] = Field(
        description="What one guarantee covers. record: one row. document: one row or file that "
        "is a whole document. user: all rows with the same user_column together."
    )
    user_column: str | None = Field(
        default=None, description="Column that names the user (unit user)."
    )
    sequence_length: int = Field(ge=2, description="Most tokens of one sequence.")
    sequences_per_unit: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Sequences that each document or user is cut into, drawn and clipped one by "
        "one; what lies beyond is not used. The guarantee covers all of them together, which takes "
        "more noise. Where the text ends early, sequences are empty.",
    )
    tokenizer: str = Field(
        default="auto",
        pattern=r"\S",
        description="auto: the one in model.path. bytes: built in, trained on nothing. "
        "Otherwise a local tokenizer folder, which must not have been trained on private data.",
    )
    max_records: int | None = Field(
        default=None, ge=1, description="Use only the first units, in the order of their names."
    )
    heldout: Path | None = Field(
        default=None, description="File or folder with public held-out data."
    )
    heldout_pattern: str | None = Field(
        default=None,
        description="Files of the train folder that are held out and never trained on.",
    )
    heldout_records: int = Field(default=64, ge=1, description="Most held-out units to evaluate.")
    heldout_is_public: StrictBool = Field(
        default=False,
        description="Must be set to true with held-out data: its loss is published unprotected.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if (self.unit == "user") != (self.user_column is not None):
            raise ValueError(
                'user_column belongs to unit = "user": give both, or neither of the two'
            )
        if self.unit == "record" and self.sequences_per_unit > 1:
            raise ValueError(
                f'sequences_per_unit is {self.sequences_per_unit} and unit is "record", which is '
                'one sequence: set unit = "document" or "user", or leave sequences_per_unit out'
            )
        if self.unit == "user" and self.format == "text":
            raise ValueError(
                'unit = "user" needs rows with a user column: jsonl, parquet or dataset'
            )
        if self.heldout is not None and self.heldout_pattern is not None:
            raise ValueError("give heldout or heldout_pattern, not both")
        if self.has_heldout and not self.heldout_is_public:
            raise ValueError(
                "the loss on held-out data is published without protection: set "
                "heldout_is_public = true if that data is public, or remove it"
            )
        return self

    @property
    def drawn(self) -> str:
        """What is drawn and clipped by itself, in the singular."""
        return self.unit if self.sequences_per_unit == 1 else "sequence"

    @property
    def has_heldout(self) -> bool:
        """Whether a held-out loss is computed."""
        return self.heldout is not None or self.heldout_pattern is not None


class Privacy(Section):
    """How much may become known about one unit (`[privacy]`)."""

    target_epsilon: float | None = Field(
        default=None, gt=0, description="ε at the end of the run; the noise is computed from it."
    )
    noise_multiplier: float | None = Field(
        default=None, gt=0, description="Noise in units of clip_norm; ε is computed from it."
    )
    delta: float | Literal["auto"] = Field(
        description='Probability that ε does not hold; below 1/N. "auto" is N^-1.1 for N units.'
    )
    sampling_probability: float | None = Field(
        default=None, gt=0, le=1, description="Probability that a sequence takes part in a step."
    )
    expected_batch_size: float | None = Field(
        default=None,
        gt=0,
        description="Expected sequences per step; divided by all of them it is the probability.",
    )
    steps: int = Field(ge=1, description="Number of optimizer steps, each one noisy release.")
    clip_norm: float = Field(
        default=1.0, gt=0, description="Bound on the norm of one sequence's gradient."
    )
    clipping: Literal["clip", "automatic"] = Field(
        default="clip", description="clip: min(1, C/n). automatic: C/(n + gamma)."
    )
    gamma: float = Field(default=0.01, ge=0, description="Keeps automatic clipping stable.")
    groups: Literal["flat", "block", "layer", "parameter"] = Field(
        default="flat",
        description="Who shares a threshold. The thresholds of all groups are equal, and their "
        "squares add up to that of clip_norm, so the privacy does not depend on it.",
    )
    sums: Literal["fp32", "exact"] = Field(
        default="fp32",
        description="exact: clipped gradients are added as integers, without rounding.",
    )
    norm_probes: int | None = Field(
        default=None,
        ge=1,
        description="Gaussian probes that estimate the norms of large weights; without it norms "
        "are exact. Long sequences take less time, and the noise is raised for the estimates.",
    )
    norm_blocks: int = Field(
        default=4,
        ge=1,
        description="The estimate is the largest of this many means; divides norm_probes.",
    )
    noise: Literal["aes", "chacha20", "philox"] = Field(
        default="aes",
        description="aes: cryptographically strong noise. chacha20: the same, drawn on the GPU. "
        "philox: not cryptographic; the privacy statement says so.",
    )
    key_file: Path | None = Field(
        default=None,
        description="File with the secret key, created when it is missing. "
        "Default: beside the run folder, with the ending .key.",
    )

    @field_validator("delta")
    @classmethod
    def _probability(cls, delta: float | str) -> float | str:
        if isinstance(delta, float) and not 0 < delta < 1:
            raise ValueError("delta must be above 0 and below 1")
        return delta

    @model_validator(mode="after")
    def _one_of_each(self) -> Privacy:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give exactly one of target_epsilon and noise_multiplier")
        if (self.sampling_probability is None) == (self.expected_batch_size is None):
            raise ValueError("give exactly one of sampling_probability and expected_batch_size")
        if self.norm_probes is not None and self.norm_probes % self.norm_blocks:
            raise ValueError(
                f"norm_blocks is {self.norm_blocks} and norm_probes is {self.norm_probes}; "
                "norm_blocks must divide norm_probes, as 4 divides 64"
            )
        return self


class Optimizer(Section):
    """AdamW with a schedule that depends on the step number only (`[optimizer]`)."""

    learning_rate: float = Field(default=1e-3, gt=0, description="Highest learning rate.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Decay of both averages.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the denominator of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="Course of the learning rate after the warm-up."
    )
    min_lr_ratio: float = Field(
        default=0.1, ge=0, le=1, description="Lowest learning rate over the highest (cosine)."
    )

    @field_validator("betas")
    @classmethod
    def _decays(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both betas must be at least 0 and below 1")
        return betas


class Parallel(Section):
    """How processes share the work (`[parallel]`); replicate × context processes are started."""

    context: int = Field(default=1, ge=1, description="Processes that hold one sequence together.")
    replicate: int = Field(
        default=1, ge=1, description="Copies of that group, each with its own units."
    )
    shard: Literal["context", "replicate"] = Field(
        default="context",
        description="Processes over which FSDP splits model, gradients and optimizer: those that "
        "hold one sequence together, or, with whole sequences, the copies with units of their own.",
    )
    layout: Literal["contiguous", "zigzag"] = Field(
        default="zigzag",
        description="Which positions a process holds; zigzag balances causal attention.",
    )
    attention: Literal["auto", "ulysses", "allgather"] = Field(
        default="auto", description="How attention sees the other processes' keys and values."
    )


class Compute(Section):
    """How gradients are computed (`[compute]`); results do not depend on it."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where to train.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of each process.")
    checkpointing: Literal["none", "full"] = Field(
        default="none", description="full: recompute activations block by block to save memory."
    )
    microbatch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Units per forward and backward. auto: the smallest that is about as fast as "
        "any that fits into memory; chosen at every start.",
    )
    backward: Literal[
        "auto", "single_sample", "per_sample", "bookkeeping", "two_pass", "per_layer"
    ] = Field(default="auto", description="What is kept until the clipping factors are known.")
    norms: Literal["auto", "direct", "gram"] = Field(
        default="auto", description="How per-unit gradient norms are computed."
    )
    kernels: Literal["torch", "triton"] = Field(
        default="torch",
        description="What computes norms and clipped sums. triton: veilspan-kernels, on a GPU.",
    )
    logits: Literal["auto", "whole", "chunked"] = Field(
        default="auto",
        description="chunked: not all of a unit at once. auto: if they would fill 1/8 of memory.",
    )


class Run(Section):
    """Where the results go (`[run]`)."""

    folder: Path = Field(description="Run folder; a run that was interrupted continues in it.")
    seed: int = Field(
        default=0,
        ge=0,
        le=2**64 - 1,
        description="Seed of the initial weights, never of sampling or noise.",
    )
    checkpoint_every: int = Field(default=50, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints to keep.")
    heldout_every: int = Field(default=10, ge=1, description="Steps between held-out losses.")
