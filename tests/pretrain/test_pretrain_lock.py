"""One process at a time trains into a folder."""

import errno
import signal

import pytest
from pretrain_helpers import files_of, run_process

from hbert.errors import HbertError
from hbert.pretrain import folder, lock, trainer
from hbert.pretrain.lock import LOCK, locked


def is_locked(out):
    try:
        with locked(out):
            return False
    except HbertError:
        return True


def test_a_second_process_is_refused(finished, pretrain, tmp_path):
    out, *_ = finished
    (tmp_path / "new").mkdir()
    with locked(out), locked(tmp_path / "new"):
        before = files_of(out)
        for changes in ({"resume": True}, {"out": tmp_path / "new"}):
            status, _, stderr = pretrain(**changes)
            target = changes.get("out", out)
            assert status == 2 and f"another process trains into --out {target}; wait for its end" in stderr
        assert files_of(out) == before
    assert [list(path.glob(LOCK)) for path in (out, tmp_path / "new")] == [[], []]


def test_a_run_holds_the_lock_from_before_the_text_to_behind_its_model(pretrain, out, monkeypatch):
    found = []
    for module, name in ((folder, "check_new"), (trainer, "prepare_text"), (folder, "update")):
        original = getattr(module, name)

        def watched(*args, original=original, **options):
            result = original(*args, **options)
            found.append(is_locked(out))
            return result

        monkeypatch.setattr(module, name, watched)
    assert pretrain(max_steps=1)[0] == 0
    assert len(found) > 3 and all(found) and not is_locked(out) and not (out / LOCK).exists()


@pytest.mark.parametrize(
    "moment", [("hbert.pretrain.trainer", "prepare_text"), ("hbert.pretrain.engine", "Engine.step")]
)
def test_a_killed_process_holds_it_no_longer(pretrain, words, out, tmp_path, moment):
    died, output = run_process(words(max_steps=1), tmp_path / "log", die_at=(*moment, 1, signal.SIGKILL))
    assert died == -signal.SIGKILL and (out / LOCK).exists(), output
    status, _, stderr = pretrain(max_steps=1, resume=True if (out / "run.json").exists() else None)
    assert status == 0, stderr
    assert not (out / LOCK).exists()


def test_a_lock_file_that_its_holder_has_just_removed_is_not_the_lock(tmp_path, monkeypatch):
    flock, calls = lock.fcntl.flock, []

    def late(descriptor, operation):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with locked(tmp_path):
        assert is_locked(tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_there_are_no_locks(tmp_path, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with locked(tmp_path), locked(tmp_path):
        pass
    monkeypatch.setattr(lock, "fcntl", None)
    with locked(tmp_path), locked(tmp_path):
        assert not list(tmp_path.iterdir())
