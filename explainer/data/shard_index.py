"""Tar shards as WebDataset lays them out, read at any place: which shards there are, where a sample lies in one, in which order to go."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, overload

from explainer.data.decoding import MAX_FILE_BYTES, MAX_JSON_BYTES, Stored, home_path, join_inside
from explainer.data.samplers import shuffled
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.files import replacing

FORMAT = "explainer-shards/1"
INDEX = "index.json"
LABELS, LAYERS = "json", "layers.png"
#: Open shards of one process beyond those that an order mixes.
_SPARE = 8


@dataclass(frozen=True)
class Shard:
    """One tar file: its name below the root, number of samples, bytes, and BLAKE2b of its content (32 hex digits)."""

    file: str
    samples: int
    bytes: int
    digest: str


@dataclass
class SplitIndex:
    """The shards of a split, and the number of images of each class."""

    shards: list[Shard] = field(default_factory=list)
    class_counts: list[int] = field(default_factory=list)


@dataclass
class ShardIndex:
    """``index.json``: what a root of shards holds. It grows with the number of shards, not of samples."""

    class_names: list[str]
    task: str
    no_region: list[str]
    splits: dict[str, SplitIndex]

    def text(self) -> str:
        """As JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def parse(cls, content: Any, source: str) -> ShardIndex:
        """Check what was read from ``source``.

        Raises:
            CorruptSampleError: not an index of this format; says what is wrong.
        """
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, expected {FORMAT!r}")
            splits = {name: _split(entry, source) for name, entry in content["splits"].items()}
            names, no_region = list(content["class_names"]), list(content["no_region"])
            if content["task"] not in ("multilabel", "multiclass") or not all(isinstance(n, str) for n in [*names, *no_region]):
                raise ValueError("task or class names are not what they should be")
            if any(len(split.class_counts) != len(names) for split in splits.values()):
                raise ValueError(f"it counts other classes than its {len(names)}")
            return cls(names, content["task"], no_region, splits)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptSampleError(
                f"{source} is not an index of shards ({error}). Make it with `explainer data shards CONFIG --out FOLDER`."
            ) from error


def _split(entry: Any, source: str) -> SplitIndex:
    shards = [Shard(**shard) for shard in entry["shards"]]
    for shard in shards:
        join_inside(Path(), shard.file, source)
        whole = all(type(v) is int and v > 0 for v in (shard.samples, shard.bytes))
        if not whole or not re.fullmatch(r"[0-9a-f]{32}", str(shard.digest)):  # it becomes a file name in the cache
            raise ValueError(f"shard {shard.file!r} lacks its samples, bytes or digest")
    return SplitIndex(shards, [int(count) for count in entry["class_counts"]])


class Root:
    """A folder of shards, here or wherever fsspec reaches (``s3://bucket/folder``, ``gs://...``, ``https://...``).

    Args:
        root: the folder.
        cache: folder on this machine for shards that lie elsewhere; needed for those. Processes of a machine may share it.
    """

    def __init__(self, root: str, cache: str | None = None) -> None:
        self.root, self.remote = root.rstrip("/"), "://" in root
        self.cache = None if cache is None else home_path(cache)
        if self.remote and self.cache is None:
            raise ConfigError(f"root {root} is not on this machine: say where its shards are kept meanwhile (data.options.shard_cache).")

    def index(self) -> ShardIndex:
        """Read ``index.json``."""
        source = f"{self.root}/{INDEX}"
        try:
            with self._open(INDEX) as stream:
                text = stream.read(MAX_JSON_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DatasetNotFoundError(
                f"{source} does not exist. Make shards of any data set with `explainer data shards CONFIG --out FOLDER`."
            ) from error
        except OSError as error:
            raise DatasetNotFoundError(f"{source} cannot be read ({error}). Check the address and the rights.") from error
        try:
            return ShardIndex.parse(json.loads(text), source)
        except (ValueError, RecursionError) as error:
            raise CorruptSampleError(f"{source} is not valid JSON ({str(error)[:200]}). Copy it again.") from error

    def local(self, shard: Shard) -> Path:
        """The shard on this machine, copied to the cache if it lies elsewhere.

        Raises:
            CorruptSampleError: it is missing, or not as long as the index says.
        """
        if self.remote:
            assert self.cache is not None
            # The content's name: a shard that was made anew under an old name is fetched again.
            path = self.cache / f"{shard.digest}.tar"
            if not path.is_file():
                self._fetch(shard, path)
        else:
            path = join_inside(home_path(self.root), shard.file, INDEX)
        try:
            found = path.stat().st_size
        except OSError as error:
            raise CorruptSampleError(f"{self.root}/{shard.file}: the shard is missing ({error}). Copy it again.") from error
        if found != shard.bytes:
            raise CorruptSampleError(
                f"{self.root}/{shard.file}: the shard has {found} bytes, {INDEX} says {shard.bytes}. Copy it again, or make it anew."
            )
        return path

    def _fetch(self, shard: Shard, path: Path) -> None:
        digest = hashlib.blake2b(digest_size=16)
        try:
            with replacing(path, durable=False) as kept, self._open(shard.file) as stream:
                while part := stream.read(2**22):
                    kept.write(part)
                    digest.update(part)
                if digest.hexdigest() != shard.digest:
                    raise CorruptSampleError(f"{self.root}/{shard.file}: the content is not what {INDEX} says. Make the shards anew.")
        except OSError as error:
            raise CorruptSampleError(f"{self.root}/{shard.file} cannot be fetched ({error}).") from error

    def _open(self, name: str) -> IO[bytes]:
        if not self.remote:
            return (home_path(self.root) / name).open("rb")
        try:
            import fsspec

            system, place = fsspec.core.url_to_fs(f"{self.root}/{name}")
            stream: IO[bytes] = system.open(place, "rb")
            return stream
        except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
            raise ConfigError(
                f"root {self.root} cannot be opened ({error}). pip install 'explainer-net[shards]', and the protocol's own package (s3fs)."
            ) from error


class OpenShard:
    """One shard, open for reading at any sample. Reading moves no file position, so that forked workers may share it."""

    def __init__(self, path: Path, name: str, samples: int) -> None:
        self.name = name
        self._file = path.open("rb")
        # Of each sample its key and, by extension, where its bytes are.
        self.keys: list[str] = []
        self._places: list[dict[str, tuple[int, int]]] = []
        try:
            # Nothing is extracted; members that are not plain files are passed over.
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                for member in tar:
                    self._add(member)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise CorruptSampleError(f"{name}: the shard is not a readable tar file ({error}). Copy it again.") from error
        if len(self.keys) != samples:
            raise CorruptSampleError(f"{name}: the shard has {len(self.keys)} samples, {INDEX} says {samples}. Make the shards anew.")

    def _add(self, member: tarfile.TarInfo) -> None:
        if not member.isreg():
            return
        folder, slash, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        key = folder + slash + stem
        if not self.keys or self.keys[-1] != key:
            self.keys.append(key)
            self._places.append({})
        self._places[-1][extension.lower()] = (member.offset_data, member.size)

    def read(self, place: int) -> dict[str, Stored]:
        """The files of a sample by their extensions."""
        found = {}
        for extension, (start, size) in self._places[place].items():
            name = f"{self.name}/{self.keys[place]}.{extension}"
            if size > MAX_FILE_BYTES:
                raise CorruptSampleError(f"{name} has {size} bytes, more than the limit of {MAX_FILE_BYTES}.")
            data = os.pread(self._file.fileno(), size, start)
            if len(data) != size:
                raise CorruptSampleError(f"{name}: the shard ends before the file does. Copy it again.")
            found[extension] = Stored(name, data)
        return found

    def close(self) -> None:
        """Give back the file."""
        self._file.close()


class ShardReader:
    """Samples of a split by number, through a few open shards. A pickled copy opens its own.

    Args:
        root: where the shards are.
        shards: shards of the split.
        keep_open: shards that stay open at a time.
    """

    def __init__(self, root: Root, shards: Sequence[Shard], keep_open: int) -> None:
        self.root, self.shards, self.keep_open = root, list(shards), keep_open + _SPARE
        self.ends = list(itertools.accumulate(s.samples for s in shards))
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open, self._lock = OrderedDict(), threading.Lock()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, index: int) -> dict[str, Stored]:
        """The files of one sample."""
        number = bisect.bisect_right(self.ends, index)
        with self._lock:  # another thread may close the shard
            return self._shard(number).read(index - (self.ends[number] - self.shards[number].samples))

    def _shard(self, number: int) -> OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.shards[number]
        opened = self._open[number] = OpenShard(self.root.local(shard), f"{self.root.root}/{shard.file}", shard.samples)
        while len(self._open) > self.keep_open:
            self._open.popitem(last=False)[1].close()
        return opened


class ShardOrder(Sequence[int]):
    """An epoch's order of all samples, each once, that reads a few shards at a time.

    The shards are shuffled and cut into groups of ``mixed``. The samples of each are shuffled, and a group gives one of each of its shards
    in turn until all are used up. So a rank of ``world`` (a divisor of ``mixed``) that takes every ``world``-th sample reads ``1/world`` of
    the shards, as long as those have the same length. Only the group in use is listed.

    Args:
        lengths: samples of each shard, in the data set's order.
        seed, epoch: seed and epoch of the shuffling.
        mixed: shards of a group.
    """

    def __init__(self, lengths: Sequence[int], seed: int, epoch: int, mixed: int) -> None:
        self.lengths, self.key, self.mixed = lengths, (seed, epoch), mixed
        self.starts = [0, *itertools.accumulate(lengths)]
        shards = shuffled(len(lengths), *self.key, 3)
        self.groups = [shards[i : i + mixed] for i in range(0, len(shards), mixed)]
        self.ends = list(itertools.accumulate(sum(lengths[s] for s in group) for group in self.groups))
        self._listed: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self.ends, index)
        listed = self._group(number)
        return listed[index - (self.ends[number] - len(listed))]

    def _group(self, number: int) -> list[int]:
        if self._listed[0] != number:
            rows = [[self.starts[s] + i for i in shuffled(self.lengths[s], *self.key, 4, s)] for s in self.groups[number]]
            turns = itertools.zip_longest(*rows)
            self._listed = (number, [i for turn in turns for i in turn if i is not None])
        return self._listed[1]
