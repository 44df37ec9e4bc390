"""An Opacus accountant as the ledger of a private step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from veilspan.core.errors import PrivacyError
from veilspan.core.opacus.installed import opacus
from veilspan.core.release import Release


def opacus_accountant(
    accountant: object, *, sampling_probability: float
) -> Callable[[Release], None]:
    """Return an `on_release` for `PrivateStep` that counts its releases in an Opacus accountant.

    Args:
        accountant: An Opacus accountant: `PrivacyEngine().accountant`, or one built by itself.
        sampling_probability: Probability with which each record enters a logical batch.

    Returns:
        A function that tells the accountant of one step, before the noise of that step exists.

    Raises:
        TypeError: If `accountant` is not an Opacus accountant.
        ValueError: If `sampling_probability` is outside of (0, 1].
        ImportError: If Opacus is missing or older than 1.6.
        PrivacyError: By the function, at a release whose norms are estimated.

    Guarantee:
        The accountant composes one Gaussian mechanism of the step's noise multiplier, subsampled by
        Poisson sampling. Its ε is true if batches are drawn so, as by `poisson_batches` with this
        probability, and if nothing else releases anything.

    Examples:
        >>> import torch
        >>> from opacus.accountants import RDPAccountant
        >>> from veilspan.core import Flat, PrivateStep
        >>> from veilspan.core.opacus import opacus_accountant
        >>> accountant = RDPAccountant()
        >>> step = PrivateStep(
        ...     torch.nn.Linear(3, 1),
        ...     clipping=Flat(clip_norm=1.0),
        ...     noise_multiplier=1.0,
        ...     expected_batch_size=2,
        ...     on_release=opacus_accountant(accountant, sampling_probability=0.01),
        ... )
        >>> with step:
        ...     pass  # an empty draw is a step like any other
        >>> accountant.history
        [(1.0, 0.01, 1)]
    """
    counted: Any = accountant
    if not isinstance(accountant, opacus("accountants").IAccountant):
        way_out = "pass its .accountant" if hasattr(accountant, "accountant") else "pass one"
        raise TypeError(
            f"accountant is {type(accountant).__name__}; it must be an Opacus accountant, such as "
            f"opacus.accountants.RDPAccountant() or PrivacyEngine().accountant: {way_out}."
        )
    if not 0 < sampling_probability <= 1:
        raise ValueError(
            f"sampling_probability is {sampling_probability}; it must be in (0, 1]: "
            "expected_batch_size / num_records, as given to poisson_batches."
        )

    def count(release: Release) -> None:
        if release.norms is not None:
            raise PrivacyError(
                f"Norms are estimated ({release.norms}), which Opacus does not count: its ε would "
                "be too small. Use exact norms, or veilspan.accounting with SketchedClip."
            )
        counted.step(
            noise_multiplier=release.noise_multiplier, sample_rate=float(sampling_probability)
        )

    return count
