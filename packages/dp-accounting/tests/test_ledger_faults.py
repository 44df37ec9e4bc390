"""Damage to the ledger, a full disk and a crash raise the count or are refused."""

import errno
import fcntl
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest

from veilspan.accounting import Ledger, LedgerError, PrivacyPlan, chain, files

PLAN = PrivacyPlan(noise_multiplier=1.0, sampling_probability=0.01, steps=100, delta=1e-5)
FAULTY = [(os, call) for call in ("open", "write", "fsync", "fstat", "stat", "pread")]
FAULTY.append((fcntl, "flock"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def filled(path, releases=5, **settings):
    with Ledger.create(path, PLAN, **settings) as ledger:
        for step in range(releases):
            ledger.append(step=step)
    return path


def reread(path):
    with Ledger.open(path, read_only=True) as ledger:
        return ledger.releases


@pytest.mark.parametrize("kept", [1, 10, 60, -1])
def test_torn_last_line_counts_as_spent_and_the_chain_goes_on(path, kept):
    filled(path, 5)
    raw = path.read_bytes()
    lines = raw.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    with Ledger.open(path) as ledger:
        assert ledger.releases == 5
        ledger.append(step=4, attempt=ledger.next_attempt(4))
        assert ledger.releases == 6
        ledger.verify()
    assert reread(path) == 6


def test_next_attempt_avoids_what_a_torn_line_may_have_used(path):
    filled(path, 1)
    with path.open("ab") as file:
        file.write(b'{"attempt": 0, "num')
    with Ledger.open(path) as ledger:
        assert ledger.entries[-1].torn
        assert ledger.next_attempt(1) == 1


def test_torn_header_says_that_nothing_was_recorded(path):
    filled(path, 0)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(LedgerError, match="nothing was ever recorded"):
        Ledger.open(path)
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match="nothing was ever recorded"):
        Ledger.open(path)


def _drop(lines, k):
    del lines[k]


def _change(lines, k):
    lines[k] = lines[k].replace(b'"attempt": 0', b'"attempt": 7')


def _repeat(lines, k):
    lines.insert(k, lines[k])


def _garble(lines, k):
    lines[k] = b"garbage\n"


def _swap(lines, k):
    lines[k], lines[k + 1] = lines[k + 1], lines[k]


@pytest.mark.parametrize("damage", [_drop, _change, _repeat, _garble, _swap])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_tampering_before_the_last_line_is_refused(path, damage, k):
    filled(path, 5)
    lines = path.read_bytes().splitlines(keepends=True)
    damage(lines, k)
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match="was altered"):
        Ledger.open(path)


def test_tampering_with_the_plan_in_the_header_is_refused(path):
    filled(path, 0)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"noise_multiplier": 1.0', b'"noise_multiplier": 9.0'))
    with pytest.raises(LedgerError, match="does not match its digest"):
        Ledger.open(path)


def test_verify_notices_an_end_that_was_cut_off_while_open(path):
    filled(path, 5)
    with Ledger.open(path) as ledger:
        os.truncate(path, path.stat().st_size - len(path.read_bytes().splitlines()[-1]) - 1)
        with pytest.raises(LedgerError, match="end differs"):
            ledger.verify()
        with pytest.raises(LedgerError, match="changed by somebody else"):
            ledger.append(step=5)


def _remove(path):
    path.unlink()


def _move(path):
    path.rename(path.with_suffix(".old"))


def _replace_by_its_copy(path):
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


@pytest.mark.parametrize("damage", [_remove, _move, _replace_by_its_copy])
def test_release_is_not_recorded_in_a_file_that_is_no_longer_at_its_path(path, damage):
    filled(path, 2)
    with Ledger.open(path) as ledger:
        damage(path)
        with pytest.raises(LedgerError, match="moved, removed or replaced"):
            ledger.verify()
        with pytest.raises(LedgerError, match=r"moved, removed or replaced.*did not happen"):
            ledger.append(step=2)


def test_ledger_follows_its_file_by_links_and_from_any_folder(path, tmp_path, monkeypatch):
    filled(path, 2)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with Ledger.open(link.name) as ledger:
        monkeypatch.chdir(tmp_path / "other")
        ledger.append(step=2)
        ledger.verify()
    assert reread(path) == 3


def test_line_of_brackets_without_end_is_refused_as_any_other(path):
    raw = filled(path, 1).read_bytes()
    for data in (raw + b"[" * 200_000, b"[" * 200_000 + b"\n" + raw):
        path.write_bytes(data)
        with pytest.raises(LedgerError):
            reread(path)


def test_pitfall_45_no_bytes_whatever_lower_the_count_or_run_code(path):
    filled(path, 4)
    raw = path.read_bytes()
    generator = random.Random(7)
    for _ in range(200):
        data = bytearray(raw)
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(bytes(data))
        try:
            releases = reread(path)
        except LedgerError:
            continue
        assert releases >= 4


def test_no_other_byte_anywhere_lowers_the_count(path):
    raw = filled(path, 3).read_bytes()
    for place in range(len(raw)):
        for flip in (0x01, 0x08, 0x20, 0x80, 0xFF):
            data = bytearray(raw)
            data[place] ^= flip
            try:
                assert len(chain.read(bytes(data), "ledger").entries) >= 3, (place, flip)
            except LedgerError:
                continue


@pytest.mark.parametrize("kept", [1, 2, 70])
def test_line_end_lost_after_a_torn_line_does_not_lower_the_count(path, kept):
    raw = filled(path, 2).read_bytes()
    lines = raw.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    with Ledger.open(path) as ledger:
        ledger.append(step=1, attempt=ledger.next_attempt(1))
    before, last = path.read_bytes()[:-1].rsplit(b"\n", 1)
    path.write_bytes(before + b"\x0b" + last + b"\n")
    with pytest.raises(LedgerError, match="was altered"):
        reread(path)


@pytest.mark.parametrize("length", [2, 64, 141, 300, 2000])
def test_zeros_anywhere_do_not_lower_the_count(path, length):
    raw = filled(path, 4).read_bytes()
    for place in range(len(raw)):
        zeros = bytes(min(length, len(raw) - place))
        try:
            data = raw[:place] + zeros + raw[place + length :]
            assert len(chain.read(data, "ledger").entries) >= 4, place
        except LedgerError:
            continue


def _full(real, room):
    """Return an `os.write` for a disk with `room` bytes left."""
    left = [room]

    def write(fd, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(fd, bytes(data)[: left[0]])
        left[0] -= written
        return written

    return write


@pytest.mark.parametrize("room", [0, 1, 50])
def test_full_disk_stops_the_run_and_leaves_the_ledger_as_it_was(path, monkeypatch, room):
    filled(path, 2)
    before = path.read_bytes()
    ledger = Ledger.open(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", _full(os.write, room))
        with pytest.raises(LedgerError, match=r"No space left.*did not happen"):
            ledger.append(step=2)
    assert path.read_bytes() == before
    with pytest.raises(LedgerError, match="was closed"):
        ledger.append(step=2)
    with Ledger.open(path) as again:
        again.append(step=2)
        assert again.releases == 3


def test_full_disk_that_cannot_even_be_cut_back_counts_the_half_line(path, monkeypatch):
    filled(path, 2)
    ledger = Ledger.open(path)

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", _full(os.write, 30))
        patch.setattr(os, "ftruncate", broken)
        with pytest.raises(LedgerError):
            ledger.append(step=2)
    assert reread(path) == 3


def test_failing_flush_counts_the_line_and_stops_the_run(path, monkeypatch):
    filled(path, 2)
    ledger = Ledger.open(path)

    def broken(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(LedgerError, match="Input/output error"):
            ledger.append(step=2)
    assert reread(path) == 3


def _failing(monkeypatch, module, call, nth, error):
    """Let the n-th use of a system call fail."""
    real, uses = getattr(module, call), itertools.count(1)

    def fail(*arguments, **options):
        if next(uses) == nth:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(module, call, fail)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOLCK, errno.EACCES])
@pytest.mark.parametrize(("module", "call"), FAULTY)
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_every_system_call_that_fails_ends_in_an_error_that_names_the_file(
    path, monkeypatch, module, call, nth, number
):
    filled(path, 2)
    appended, message = 0, str(path)
    with monkeypatch.context() as patch:
        _failing(patch, module, call, nth, OSError(number, os.strerror(number)))
        try:
            with Ledger.open(path) as ledger:
                for step in (2, 3):
                    ledger.append(step=step)
                    appended += 1
                ledger.verify()
        except LedgerError as error:
            message = str(error)
    assert str(path) in message
    with Ledger.open(path) as again:  # neither lock nor descriptor was left behind
        assert again.releases >= 2 + appended
        again.append(step=4)
        again.verify()


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_interrupted_creation_leaves_neither_file_nor_lock_behind(path, monkeypatch, call):
    with monkeypatch.context() as patch:
        _failing(patch, os, call, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            Ledger.create(path, PLAN)
    assert not path.exists()
    with Ledger.create(path, PLAN) as ledger:
        ledger.append(step=0)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_ledger_takes_no_further_release_after_an_interrupted_one(path, monkeypatch, call):
    ledger = Ledger.open(filled(path, 2))
    with monkeypatch.context() as patch:
        _failing(patch, os, call, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            ledger.append(step=2)
    with pytest.raises(LedgerError, match="was closed"):
        ledger.append(step=2)
    with Ledger.open(path) as again:
        assert again.releases == (2 if call == "write" else 3)


def test_full_disk_at_creation_leaves_no_file_behind(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", _full(os.write, 20))
        with pytest.raises(LedgerError, match="No space left"):
            Ledger.create(path, PLAN)
    assert not path.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_device_that_is_full_is_noticed():
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            files.write_all(descriptor, b"line\n")
    finally:
        os.close(descriptor)


def run_child(path, body):
    code = textwrap.dedent(
        f"""
        import os, resource, signal, sys
        from veilspan.accounting import Ledger, LedgerError
        ledger = Ledger.open({str(path)!r})
        """
    ) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_size_limit_of_the_system_stops_the_run_with_nothing_half_counted(path):
    filled(path, 2)
    before = path.read_bytes()
    child = run_child(
        path,
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = os.path.getsize(ledger.path) + 40
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            ledger.append(step=2)
        except LedgerError as error:
            print(error)
            sys.exit(3)
        """,
    )
    assert child.returncode == 3, child.stderr
    assert "File too large" in child.stdout
    assert path.read_bytes() == before


@pytest.mark.parametrize(("room", "expected"), [(0, 2), (1, 3), (70, 3), (10_000, 3)])
def test_crash_in_the_middle_of_a_line_never_under_counts(path, room, expected):
    filled(path, 2)
    child = run_child(
        path,
        f"""
        real = os.write
        def write(fd, data):
            real(fd, bytes(data)[:{room}])
            os.kill(os.getpid(), signal.SIGKILL)
        os.write = write
        ledger.append(step=2)
        """,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert reread(path) == expected
    with Ledger.open(path) as ledger:  # the lock died with the process
        ledger.append(step=2, attempt=ledger.next_attempt(2))
        assert ledger.releases == expected + 1


def test_crash_after_a_recorded_release_counts_it(path):
    filled(path, 2)
    child = run_child(path, "ledger.append(step=2)\nos._exit(9)\n")
    assert child.returncode == 9, child.stderr
    assert reread(path) == 3


@pytest.mark.parametrize(
    ("written", "edited"),
    [
        *(
            ('"budget_epsilon": 2.0', f'"budget_epsilon": {budget}')
            for budget in ('"2"', "NaN", "1e999", "-1", "true", "[2]")
        ),
        ('"run_id": "warm-up"', '"run_id": 5'),
        ('"data": "letters"', '"data": 7'),
        ('"data": "letters"', '"data": " "'),
    ],
)
def test_header_that_was_edited_into_what_no_run_writes_is_refused(path, written, edited):
    """No release holds the header in the chain yet; an endless budget would never stop a run."""
    filled(path, 0, run_id="warm-up", budget_epsilon=2.0, data="letters")
    text = path.read_text(encoding="utf-8")
    assert written in text
    path.write_text(text.replace(written, edited), encoding="utf-8")
    with pytest.raises(LedgerError, match="damaged header"):
        Ledger.open(path)
