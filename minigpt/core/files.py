"""Files that are either there whole or not at all: atomic writes, hashes, locks, cache paths."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt.core.errors import DataError, UsageError

# what \s is for bytes, and the UTF-8 of U+85 U+A0 U+1680 U+2000-200A U+2028 U+2029 U+202F U+205F U+3000 U+FEFF
_BLANK = re.compile(
    rb"(?:[\s\x1c-\x1f]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80|\xef\xbb\xbf)*"
)


def without_bom(raw: bytes) -> bytes:
    """Bytes of a file, or of a line of joined files, without the byte-order marks of UTF-8 that they begin with."""
    while raw.startswith(codecs.BOM_UTF8):
        raw = raw[len(codecs.BOM_UTF8) :]
    return raw


def is_blank(raw: bytes) -> bool:
    """Whether UTF-8 text shows nothing: spaces of any script, line ends and byte-order marks alone."""
    return _BLANK.fullmatch(raw) is not None


def quoted(path: str | Path) -> str:
    """A path as a shell takes it, for commands that are suggested; letters of any script need no quotes."""
    text = str(path)
    return text if re.fullmatch(r"[\w@%+=:,./-]+", text) else shlex.quote(text)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync_dir(path: Path) -> None:
    """Make a rename inside `path` durable. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data`: a reader sees the old file or the new one, never a part.

    DataError (exit 3) names the path when the disk refuses.
    """
    raw = data.encode("utf-8") if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(raw)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        fsync_dir(path.parent)
    except OSError as e:
        raise disk_error(e, path) from e


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Parse one JSON file. DataError names the file, and the line where parsing stopped."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as e:
        raise DataError(f"{path} cannot be read", found=e.strerror or str(e)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{path} is not valid JSON", found=str(e)) from None


def cache_dir() -> Path:
    """Where token stores and unpacked models live: $MINIGPT_CACHE, else the platform's cache directory."""
    if chosen := os.environ.get("MINIGPT_CACHE"):
        return Path(chosen).expanduser()
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "minigpt"


def remembered_sha256(path: Path) -> str:
    """sha256 of a file, kept in the cache for as long as its size and time of change stay the same."""
    stat = path.stat()
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    memo = cache_dir() / "hashes" / f"{name}.json"
    stamp = [stat.st_size, stat.st_mtime_ns]
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = sha256(path)
    write_json(memo, {"path": str(path.resolve()), "stamp": stamp, "sha256": digest})
    return digest


@contextlib.contextmanager
def new_dir(path: Path) -> Iterator[Path]:
    """Build a directory under a temporary name beside `path`, then rename it into place.

    Every file is synced before the rename, so a crash leaves `path` absent or complete.
    An existing `path` is replaced. DataError (exit 3) names the path when the disk refuses.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as e:
        raise disk_error(e, path) from e
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as f:
                    os.fsync(f.fileno())
        for folder in [work, *(d for d in work.rglob("*") if d.is_dir())]:
            fsync_dir(folder)
        os.chmod(work, 0o755)
        if path.exists():  # a directory cannot be renamed over a full one: step aside, then swap
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.replace(path, aside / path.name)
            try:
                os.replace(work, path)
            except BaseException:
                os.replace(aside / path.name, path)
                raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(work, path)
        fsync_dir(path.parent)
    except OSError as e:
        shutil.rmtree(work, ignore_errors=True)
        raise disk_error(e, path) from e
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path of the same name, in a directory of its own beside `path`, to be written and moved to `path`.

    The file is synced before it is moved, so a reader sees the old one or the whole new one; other files that the block
    leaves in that directory are deleted. DataError (exit 3) names `path` when the disk refuses.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
            work = Path(folder) / path.name
            yield work
            with open(work, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(work, path)
        fsync_dir(path.parent)
    except OSError as e:
        raise disk_error(e, path) from e


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what a disk that takes no more answers


def disk_error(e: OSError, path: Path) -> DataError:
    """An OSError of a write as an error with a way out."""
    place = "MINIGPT_CACHE" if cache_dir() in path.parents else "--out"
    again = ", then start again (a training run with --resume)"
    fix = {
        errno.ENOSPC: f"free some space or point {place} at another disk{again}",
        errno.EDQUOT: f"free some of your quota or point {place} at another disk{again}",
        errno.EFBIG: f"raise the limit on the size of a file (ulimit -f){again}",
        errno.EACCES: f"choose a directory you may write to with {place}",
        errno.EROFS: f"choose a directory you may write to with {place}",
        errno.ENOENT: f"choose a directory that can be created with {place}",
        errno.ENOTDIR: f"choose another {place}: a file stands where a directory is needed",
        errno.EEXIST: f"choose another {place}: a file stands where a directory is needed",
    }.get(e.errno or 0)
    return DataError(f"could not write {path}: {e.strerror or e}", fix=fix)


class RunLock:
    """One process per run directory. The kernel frees the lock when its owner dies, also by kill -9."""

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / ".lock"
        self._handle: Any = None

    def __enter__(self) -> RunLock:
        try:
            self._handle = open(self.path, "a+", encoding="utf-8")
        except OSError as e:
            raise disk_error(e, self.path) from e
        try:
            free = _try_lock(self._handle)
        except OSError as e:
            self._handle.close()
            raise DataError(
                f"could not lock {self.path}: {e.strerror or e}", fix="choose another disk with --out"
            ) from e
        if not free:
            self._handle.seek(0)
            owner = self._handle.read().strip() or "another process"
            self._handle.close()
            raise UsageError(
                f"{self.path.parent} is in use by {owner}",
                fix="wait for it to end, stop it, or choose another --out",
            )
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = f"process {os.getpid()} on {socket.gethostname()}, started {started}"
        with contextlib.suppress(OSError):  # the lock holds without a name on it, which a full disk may refuse
            self._handle.truncate(0)
            os.write(self._handle.fileno(), owner.encode())
        return self

    def __exit__(self, *exc: object) -> None:
        self._handle.close()


def _try_lock(handle: Any) -> bool:
    """Take an exclusive lock on an open file without waiting. OSError on a disk that has no locks."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle.fileno(), 1 << 30, os.SEEK_SET)  # behind the text: what is locked cannot be read there
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
