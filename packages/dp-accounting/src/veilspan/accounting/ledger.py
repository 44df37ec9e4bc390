"""The append-only ledger: every release is on disk before its noise exists."""

from __future__ import annotations

import os
import secrets
import uuid
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, Self

from veilspan.accounting import chain, files
from veilspan.accounting.bounds import EpsilonBounds, at_least, round_up
from veilspan.accounting.calibration import largest
from veilspan.accounting.chain import Contents, Header, LedgerEntry, LedgerError
from veilspan.accounting.engines import CertifiedEngine, PldEngine
from veilspan.accounting.mechanism import check_count
from veilspan.accounting.plan import PrivacyPlan


class BudgetExceeded(RuntimeError):  # noqa: N818 - it ends a run, it is not a mistake
    """One more release would exceed the budget; nothing was recorded and nothing may be released.

    Everything released so far stays within the budget: end the run and keep its result.
    """


class Ledger:
    """Count the releases of one run in a file that survives crashes and shows tampering.

    Make one with `Ledger.create` or `Ledger.open`, not with the constructor. One process writes at
    a time; others may open it with `read_only=True`.

    Guarantee:
        When `append` returns, the release is on disk. Damage to the file raises the count or is
        refused; it never lowers the count.

    Examples:
        >>> import tempfile, pathlib
        >>> plan = PrivacyPlan(
        ...     noise_multiplier=1.0, sampling_probability=0.01, steps=1000, delta=1e-5
        ... )
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "ledger.jsonl"
        >>> with Ledger.create(path, plan, budget_epsilon=2.0) as ledger:
        ...     ledger.append(step=0, attempt=0)
        ...     print(ledger.releases, ledger.spent())
        1 ε ≤ 0.1995 at δ = 1e-05
    """

    def __init__(self, path: Path, descriptor: int, contents: Contents, read_only: bool) -> None:
        self._path, self._place = path, os.path.abspath(path)
        self._descriptor: int | None = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self._header, self._tail = contents.header, contents.tail
        self._entries = list(contents.entries)
        self._seen = {(e.step, e.attempt) for e in self._entries if not e.torn}
        self._ends_torn, self._read_only = contents.ends_torn, read_only
        self._size = contents.size
        self._most: int | None = None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        plan: PrivacyPlan,
        *,
        budget_epsilon: float | None = None,
        run_id: str | None = None,
        data: str | None = None,
    ) -> Self:
        """Start the ledger of a new run.

        Args:
            path: File to create, readable by its owner only; must not exist yet.
            plan: What every release of the run spends.
            budget_epsilon: The ε at the plan's δ that the run must not exceed; `None` for no limit.
            run_id: Name of the run; a random one unless given.
            data: Name of the data set, one for all runs on it: ledgers of one name are summed up,
                of two names never. Choose it; a digest of private data would say something of them.

        Raises:
            LedgerError: If the file exists already or cannot be written.
            ValueError: If the budget is not above 0, or the name of the data is empty.
        """
        header = Header(
            run_id=uuid.uuid4().hex if run_id is None else run_id,
            data=data,
            plan=plan,
            budget_epsilon=budget_epsilon,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            nonce=secrets.token_hex(8),
        )
        path = Path(path)
        line = header.to_line()
        descriptor = files.create(path, line)
        return cls(path, descriptor, chain.read(line, str(path)), read_only=False)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        plan: PrivacyPlan | None = None,
        run_id: str | None = None,
        read_only: bool = False,
    ) -> Self:
        """Continue, or with `read_only` inspect, the ledger of an existing run.

        Args:
            path: The file.
            plan: The plan the caller is about to run; refused unless the ledger's is the same.
            run_id: The run the caller believes it continues; refused unless the ledger's is.
            read_only: Take no lock and refuse `append`.

        Raises:
            LedgerError: If the file is missing, damaged, of another run or plan, or in use.
        """
        path = Path(path)
        descriptor = files.reopen(path, read_only=read_only)
        try:
            contents = chain.read(files.read_all(descriptor, path), str(path))
            chain.require_same(contents.header, plan, run_id, str(path))
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, contents, read_only=read_only)

    @property
    def path(self) -> Path:
        """Return where the ledger lies."""
        return self._path

    @property
    def plan(self) -> PrivacyPlan:
        """Return the plan that every release spends from."""
        return self._header.plan

    @property
    def run_id(self) -> str:
        """Return the name of the run."""
        return self._header.run_id

    @property
    def data(self) -> str | None:
        """Return the name of the data set; None if it was given none."""
        return self._header.data

    @property
    def budget_epsilon(self) -> float | None:
        """Return the ε that must not be exceeded, `None` for no limit."""
        return self._header.budget_epsilon

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """Return every spent release in order of recording, torn lines included."""
        return tuple(self._entries)

    @property
    def releases(self) -> int:
        """Return the number of releases spent: every attempt and every torn line counts."""
        return len(self._entries)

    @property
    def most_releases(self) -> int | None:
        """Return how many releases the budget allows in all, `None` without a budget."""
        if self.budget_epsilon is None:
            return None
        if self._most is None:
            self._most = _most_releases(self.plan, self.budget_epsilon)
        return self._most

    def spent(self) -> EpsilonBounds:
        """Return bounds on the ε of all releases so far, at the plan's δ."""
        return self.plan.epsilon_after(self.releases)

    def next_attempt(self, step: int) -> int:
        """Return an attempt number for `step` that no recorded or torn line can have used."""
        attempts = [e.attempt for e in self._entries if e.step == step and e.attempt is not None]
        torn = sum(e.torn for e in self._entries)
        return max(attempts, default=-1) + 1 + torn

    def append(self, *, step: int, attempt: int = 0) -> None:
        """Record one release, on disk, before its noise is drawn.

        Args:
            step: Step of the training run, at least 0.
            attempt: Which attempt at this step, from 0; see `next_attempt`.

        Raises:
            BudgetExceeded: If the budget does not allow one more; nothing is written.
            LedgerError: If it cannot be recorded; the release must not happen, and this object
                takes no further ones. Open the ledger again to go on.
            ValueError: If a number is out of range.

        Guarantee:
            Returns only after the line was flushed to the disk.
        """
        check_count("step", step)
        check_count("attempt", attempt)
        descriptor = self._writable()
        if (step, attempt) in self._seen:
            raise LedgerError(
                f"{self._path} already holds step {step}, attempt {attempt}: drawing its noise "
                f"again would repeat it. Use attempt={self.next_attempt(step)}."
            )
        self._require_budget()
        # the day alone: the time between two releases would tell how many records were drawn
        entry = LedgerEntry(step=step, attempt=attempt, day=str(datetime.now(UTC).date()))
        line = chain.entry_line(entry, self.releases + 1, self._tail)
        written = b"\n" + line if self._ends_torn else line
        try:
            if not files.lies_at(self._place, descriptor):
                self._fail("was moved, removed or replaced while this run was using it")
            if os.fstat(descriptor).st_size != self._size:
                self._fail("was changed by somebody else while this run was using it")
            files.append(descriptor, written, self._size)
            self._size += len(written)
            self._ends_torn, self._tail = False, chain.digest(line)
            self._entries.append(entry)
            self._seen.add((step, attempt))
        except OSError as error:
            self._fail(f"could not be written: {error}. Free some space or repair the disk", error)
        except BaseException:  # an interrupt: the line may be on disk, so what is known here is old
            self.close()
            raise

    def _require_budget(self) -> None:
        most = self.most_releases
        if most is None or self.releases < most:
            return
        after = self.plan.epsilon_after(self.releases + 1)
        raise BudgetExceeded(
            f"Release {self.releases + 1} would spend ε ≤ {round_up(after.upper)} at "
            f"δ = {at_least(self.plan.delta)}, above the budget of {self.budget_epsilon:g}, which "
            f"allows {most} releases. Nothing was recorded. End the run here, or plan a new one "
            "with more noise or fewer steps."
        )

    def require_at_least(self, releases: int) -> None:
        """Refuse to go on if the ledger holds fewer releases than a checkpoint has seen.

        Args:
            releases: Number of releases that the checkpoint's model came from.

        Raises:
            LedgerError: If the ledger is shorter: its end was lost, and with it the true ε.
        """
        check_count("releases", releases)
        if self.releases < releases:
            raise LedgerError(
                f"{self._path} holds {self.releases} releases, but the checkpoint was made after "
                f"{releases}: the end of the ledger was lost. Restore it, or start a new run; "
                "going on would under-count the privacy spent."
            )

    def verify(self) -> None:
        """Read the file again and check every link of its chain against what this object knows.

        Raises:
            LedgerError: If a line was changed, removed, inserted or cut off, or the file is
                no longer at its path.
        """
        descriptor = self._open_descriptor()
        if not files.lies_at(self._place, descriptor):
            raise LedgerError(f"{self._path} was moved, removed or replaced since it was opened.")
        contents = chain.read(files.read_all(descriptor, self._path), str(self._path))
        if contents.tail != self._tail or len(contents.entries) != self.releases:
            raise LedgerError(f"{self._path} was altered since it was opened: its end differs.")

    def close(self) -> None:
        """Release the file and its lock; the ledger can then be opened by another process."""
        self._descriptor = None
        self._close()

    def __repr__(self) -> str:
        state = "closed" if self._descriptor is None else "read only" if self._read_only else "open"
        run = f"run_id={self.run_id!r}, releases={self.releases}"
        return f"<Ledger {str(self._path)!r}, {run}, budget_epsilon={self.budget_epsilon}, {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise LedgerError(f"{self._path} was closed. Open it again with Ledger.open.")
        return self._descriptor

    def _writable(self) -> int:
        descriptor = self._open_descriptor()
        if self._read_only:
            raise LedgerError(f"{self._path} was opened with read_only=True and takes no releases.")
        return descriptor

    def _fail(self, what: str, cause: BaseException | None = None) -> NoReturn:
        self.close()
        raise LedgerError(
            f"{self._path} {what}. The release did not happen; open the ledger again to go on."
        ) from cause


def _most_releases(plan: PrivacyPlan, budget: float) -> int:
    """Return the largest number of releases whose ε is within the budget."""
    engine = CertifiedEngine(pld=PldEngine(one_sided=True))  # what calibration uses
    return largest(
        lambda releases: plan.epsilon_after(releases, engine=engine).upper <= budget,
        start=plan.steps,
    )
