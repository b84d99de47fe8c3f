"""numpy's `.npy` and `.npz` files from strangers, read without trusting what they claim.

No pickled object is ever read. An array is built only from bytes that are there: a header that claims a
terabyte allocates nothing, and an archive that unpacks to far more than its size is refused.
"""

from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from a2mc_fast.data.source import existing
from a2mc_fast.errors import InputError, require

_KINDS = "fiubUS"  # numbers, booleans and strings; no objects, no structures
_WORDS = {"f": "floats", "i": "integers", "u": "unsigned integers", "b": "booleans", "U": "text"}
_NPZ = "a .npz file"
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_MAX_RATIO, _SLACK = 100, 1 << 20  # an archive may unpack to this many times its size, plus this many bytes
_MAX_MEMBERS = 1000  # each is looked up in the list of all
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes; others unpack without a bound
_MAX_AXES, _MAX_AXIS = 32, 1 << 62


@contextmanager
def damaged(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a reader raises on a damaged file into one sentence about `path`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib, pickle and numpy report damage in a dozen ways
        text = str(error).strip().partition("\n")[0][:120]
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise InputError(f"{path} is damaged or not {kind} ({reason})") from None


def map_npy(path: Path) -> np.ndarray:
    """The array of a `.npy` file, read-only and mapped: only what is used is read."""
    existing(path, "a .npy file")
    with path.open("rb") as file, damaged(path, "a .npy file"):
        shape, fortran, dtype = _header(file, path.stat().st_size, str(path))
        if not math.prod(shape):
            return np.empty(shape, dtype)  # nothing to map
        with np.errstate(over="ignore"):  # of endless many texts without a letter
            return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _header(stream: IO[bytes], size: int, where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran order, dtype) of a `.npy` stream of `size` bytes, which it must fill."""
    version = np.lib.format.read_magic(stream)
    read_header = _READ_HEADER.get(version)
    if read_header is None:
        raise InputError(f"{where} has npy version {version}, expected 1.0 or 2.0")
    shape, fortran, dtype = read_header(stream)
    require(dtype.kind in _KINDS, f"{where} holds {dtype}, expected numbers or strings")
    require(
        len(shape) <= _MAX_AXES and all(0 <= axis <= _MAX_AXIS for axis in shape),
        f"{where} claims a shape that no array has",
    )
    claimed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    require(
        claimed == held, f"{where} claims {list(shape)} of {dtype}, {claimed:,} bytes, but holds {held:,}"
    )
    return shape, fortran, dtype


def texts(array: np.ndarray) -> list[str]:
    """The strings of an array [N]. `ValueError` for another array, or codes that are no characters."""
    if array.dtype.kind != "U" or array.ndim != 1:
        raise ValueError(f"{array.dtype} {list(array.shape)} where strings were expected")
    codes = np.ascontiguousarray(array).view(f"{array.dtype.byteorder}u4")
    if codes.size and codes.max() > sys.maxunicode:  # numpy would make a string that Python cannot handle
        raise ValueError("strings with codes that are no characters")
    return array.tolist()


class Rows:
    """An array inside an archive, read along its first axis from front to back."""

    def __init__(self, stream: IO[bytes], size: int, path: Path, name: str) -> None:
        self._stream, self._path, self._where = stream, path, f"{path}: {name}"
        with damaged(path, _NPZ):
            self.shape, self._fortran, self.dtype = _header(stream, size, self._where)

    def take(self, count: int) -> np.ndarray:
        """The next `count` rows."""
        require(
            not self._fortran or len(self.shape) < 2,
            f"{self._where} is stored in Fortran order; save it again with numpy.ascontiguousarray",
        )
        return self._read((count, *self.shape[1:]))

    def all(self) -> np.ndarray:
        """The whole array."""
        return self._read(self.shape[::-1]).T if self._fortran else self._read(self.shape)

    def _read(self, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape) * self.dtype.itemsize
        with damaged(self._path, _NPZ):
            data = self._stream.read(size)
            require(len(data) == size, f"{self._where} ends early")
            if self.dtype == np.bool_:  # any byte may be there, and torch counts on 0 and 1
                return (np.frombuffer(data, np.uint8) != 0).reshape(shape)
            return np.frombuffer(data, self.dtype, math.prod(shape)).reshape(shape)


class Archive:
    """A `.npz` file."""

    def __init__(self, path: Path) -> None:
        self.path = existing(path, _NPZ)
        with path.open("rb") as file, damaged(path, _NPZ):
            infos = zipfile.ZipFile(file).infolist()
        members = {info.filename: info.file_size for info in infos}
        require(
            len(members) == len(infos) <= _MAX_MEMBERS,
            f"{path} holds {len(infos):,} arrays under {len(members):,} names; refused",
        )
        require(
            all(info.compress_type in _METHODS for info in infos),
            f"{path} is packed by a method that numpy does not write; save it with numpy.savez_compressed",
        )
        size, unpacked = path.stat().st_size, sum(members.values())
        require(
            unpacked <= _MAX_RATIO * size + _SLACK,
            f"{path} would unpack to {unpacked:,} bytes, over {_MAX_RATIO} times its size; refused",
        )
        self._sizes = {name.removesuffix(".npy"): n for name, n in members.items() if name.endswith(".npy")}

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def need(self, *names: str) -> None:
        """Raise `InputError` unless the archive has all these arrays."""
        missing = [name for name in names if name not in self]
        require(
            not missing,
            f"{self.path} has no {', '.join(missing)}; it holds {', '.join(self) or 'no array at all'}",
        )

    @contextmanager
    def rows(self, name: str) -> Iterator[Rows]:
        """An array to be read row by row; the file is open within the context."""
        self.need(name)
        with self.path.open("rb") as file:
            with damaged(self.path, _NPZ):
                stream = zipfile.ZipFile(file).open(f"{name}.npy")  # noqa: SIM115 (closed below)
            with stream:
                yield Rows(stream, self._sizes[name], self.path, name)

    def array(self, name: str, kinds: str, ndim: int) -> np.ndarray:
        """A whole array, of one of numpy's dtype `kinds` and with `ndim` axes."""
        with self.rows(name) as rows:
            require(
                rows.dtype.kind in kinds and len(rows.shape) == ndim,
                f"{self.path}: {name} is {rows.dtype} {list(rows.shape)}, expected {ndim} axes of "
                + " or ".join(_WORDS[kind] for kind in kinds),
            )
            return rows.all()

    def texts(self, name: str, most: int) -> list[str]:
        """A whole array of strings, [N] with N up to `most`; none are made of a longer one."""
        with self.rows(name) as rows:
            count = math.prod(rows.shape)
        require(count <= most, f"{self.path}: {name} has {count:,} entries, expected up to {most:,}")
        array = self.array(name, "U", ndim=1)
        try:
            return texts(array)
        except ValueError as error:
            raise InputError(f"{self.path}: {name} holds {error}") from None
