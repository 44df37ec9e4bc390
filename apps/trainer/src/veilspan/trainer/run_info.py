"""What a run folder tells of its run, and of every start that worked on it."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata

_FORMAT = 2
_PACKAGES = (
    "veilspan-core",
    "veilspan-accounting",
    "veilspan-parallel",
    "veilspan-kernels",
    "veilspan-trainer",
    "torch",
    "transformers",
    "peft",
    "numpy",
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run: machine and software may be others than those it began with.

    Args:
        releases: Releases that the ledger held when it started.
        processes: Number of processes; None where an older version did not note it.
        device: What it trained on.
        versions: Package name → version.
    """

    releases: int
    processes: int | None
    device: str
    versions: dict[str, str]

    def __str__(self) -> str:
        """Return the machine in words."""
        if self.processes is None:
            return self.device
        return f"{self.device}, {self.processes} process{'es' if self.processes > 1 else ''}"


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Public facts about a run (`run.json`), fixed when it begins, and its starts.

    Args:
        recipe_digest: From `recipe_digest`.
        key_fingerprint: From `secrets.key_fingerprint`.
        num_records: Number N of protected units.
        num_heldout: Number of public held-out records.
        model_type: Architecture, as transformers names it.
        parameters: All parameters; a tied one counts once.
        trainable: Parameters that are trained.
        starts: The starts that released something, and the newest one; oldest first.
    """

    recipe_digest: str
    key_fingerprint: str
    num_records: int
    num_heldout: int
    model_type: str
    parameters: int
    trainable: int
    starts: tuple[Start, ...]
    format: int = _FORMAT

    @classmethod
    def from_json(cls, text: str) -> RunInfo:
        """Return what `to_json` wrote, also as version 0.1.0 did: with its first start alone.

        Raises:
            ValueError, KeyError, TypeError: If it is damaged, or of a format to come.
        """
        fields = json.loads(text)
        if fields["format"] == 1:
            alone = {name: fields.pop(name) for name in ("device", "versions")}
            fields |= {"starts": [{"releases": 0, "processes": None, **alone}], "format": _FORMAT}
        if fields["format"] != _FORMAT:
            raise ValueError(f"format {fields['format']}, this version reads up to {_FORMAT}")
        starts = tuple(Start(**start) for start in fields.pop("starts"))
        return cls(starts=starts, **fields)

    def to_json(self) -> str:
        """Return the text of `run.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def continued(self, now: RunInfo, releases: int) -> RunInfo:
        """Return these facts with the start of `now`, before which there were `releases`.

        Starts after which nothing was released are left out.
        """
        before = tuple(start for start in self.starts if start.releases < releases)
        return replace(self, starts=(*before, replace(now.starts[-1], releases=releases)))

    def worked(self, releases: int) -> Sequence[Start]:
        """Return the starts that made these releases; of none, all."""
        return [start for start in self.starts if start.releases < releases] or self.starts


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the guarantee depends on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def used_versions(starts: Sequence[Start]) -> dict[str, str]:
    """Return the versions of all starts; where they differ, each in the order of its first use."""
    used: dict[str, list[str]] = {}
    for start in starts:
        for package, version in start.versions.items():
            known = used.setdefault(package, [])
            if version not in known:
                known.append(version)
    return {package: ", then ".join(versions) for package, versions in used.items()}
