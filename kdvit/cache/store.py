"""Records of teacher outputs in files of fixed size: written one after another, read by memory maps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kdvit.cache.manifest import CacheError, Manifest, describe_origin, differing
from kdvit.files import put_in_place
from kdvit.models import FrozenTeacher
from kdvit.structures import TeacherMap, View, ViTOutput

ROWS = 1024
"""Records of a shard."""
MAPS = 4096
"""Files that a process keeps mapped; Linux allows 65,530."""
PRECISION = np.dtype("<f2")
"""Type of the stored numbers."""


def record_type(manifest: Manifest) -> np.dtype[Any]:
    """Returns the type of one record: the number of the image that was shown, the logits, the maps."""
    fields: list[tuple[Any, ...]] = [("image", "<u4")]
    if manifest.topk is not None and manifest.classes is not None:
        fields.append(("classes", "<u2" if manifest.classes <= 2**16 else "<u4", (manifest.topk,)))
        fields.append(("logits", PRECISION, (manifest.topk + 1,)))
    elif manifest.classes is not None:
        fields.append(("logits", PRECISION, (manifest.classes,)))
    maps = zip(manifest.maps, manifest.shapes, strict=True)
    return np.dtype([*fields, *((field_name(each), PRECISION, shape) for each, shape in maps)])


def field_name(each: TeacherMap) -> str:
    """Returns the name of a map in a record."""
    return f"layer{each.layer}" + ("" if each.target is None else f" ({each.target.name})")


def shrink_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keeps the most probable classes at temperature 1, and how probable the others are on average.

    Args:
        logits: ``[B, K]``.
        k: Number of classes to keep, below K.

    Returns:
        The classes ``[B, k]``, and ``[B, k + 1]``: their log-probabilities, then the log of the mean probability of all
        other classes.
    """
    ranked, classes = logits.float().log_softmax(dim=1).sort(dim=1, descending=True, stable=True)
    others = ranked[:, k:]
    rest = others.logsumexp(dim=1, keepdim=True) - torch.tensor(others.shape[1]).log()
    return classes[:, :k], torch.cat([ranked[:, :k], rest], dim=1)


def expand_logits(classes: Tensor, values: Tensor, count: int) -> Tensor:
    """Returns logits ``[B, K]`` that give the kept classes their probabilities and spread the rest evenly.

    At temperature 1 the kept probabilities are the teacher's. At another temperature the rest is tempered as if it were
    spread evenly, which takes away what the teacher said about the classes that are not kept.

    Examples:
        >>> classes, values = shrink_logits(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), k=2)
        >>> expand_logits(classes, values, 4).softmax(dim=1)
        tensor([[0.6439, 0.0596, 0.2369, 0.0596]])
    """
    return values[:, -1:].repeat(1, count).scatter_(1, classes, values[:, :-1])


def encode(images: Tensor, output: ViTOutput, manifest: Manifest) -> np.ndarray[Any, Any]:
    """Turns teacher outputs into records ``[B]``.

    Args:
        images: Numbers ``[B]`` of the images that the teacher has seen: others than asked for, where those cannot be
            read.
        output: What it makes of them, as it is to be stored.
        manifest: What is to be stored.

    Raises:
        CacheError: If a value is beyond the range of half precision.
    """
    records = np.empty(len(images), record_type(manifest))
    records["image"] = images.cpu().numpy()
    values = {field_name(each): feature for each, feature in zip(manifest.maps, output.features, strict=True)}
    if output.logits is not None and manifest.topk is not None:
        classes, values["logits"] = shrink_logits(output.logits, manifest.topk)
        records["classes"] = classes.cpu().numpy()
    elif output.logits is not None:
        values["logits"] = output.logits
    most = float(np.finfo(PRECISION).max)
    for name, value in values.items():
        if not (largest := float(value.float().abs().max())) <= most:
            raise CacheError(
                f"{name} of the teacher reaches {largest:g}, beyond the {most:g} of the stored "
                f"{PRECISION.name}. Distil another layer, or store the rest alone (--store logits or features)."
            )
        records[name] = value.float().cpu().numpy()
    return records


def shard_file(folder: Path, shard: int) -> Path:
    """Returns the file of a shard."""
    return folder / f"{shard:06d}.npy"


def shard_rows(manifest: Manifest, shard: int) -> range:
    """Returns the records of a shard."""
    return range(shard * ROWS, min((shard + 1) * ROWS, manifest.rows))


def missing_shards(folder: Path, manifest: Manifest) -> list[int]:
    """Returns the shards that have yet to be written, those included that a copy has cut off."""
    shards, kind = -(-manifest.rows // ROWS), record_type(manifest)
    head = io.BytesIO()
    _write_head(head, kind, ROWS)
    return [
        shard
        for shard in range(shards)
        if _size(shard_file(folder, shard)) != head.tell() + len(shard_rows(manifest, shard)) * kind.itemsize
    ]


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _write_head(stream: BinaryIO, kind: np.dtype[Any], rows: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(stream, header)  # as long for all numbers of rows of a shard


def append_records(folder: Path, manifest: Manifest, rows: Sequence[int], records: np.ndarray[Any, Any]) -> None:
    """Adds records to their shard, which has a temporary name until the last of them is on the disk.

    Args:
        folder: The cache.
        manifest: What it is to hold.
        rows: The numbers of the records, which follow those added before.
        records: ``[B]``.
    """
    shard = rows[0] // ROWS
    file, whole = shard_file(folder, shard), shard_rows(manifest, shard)
    with file.with_name(f"{file.name}.tmp").open("wb" if rows[0] == whole[0] else "ab") as stream:
        if rows[0] == whole[0]:
            _write_head(stream, records.dtype, len(whole))
        stream.write(records.tobytes())
        if rows[-1] == whole[-1]:
            stream.flush()
            put_in_place(stream.fileno(), file)


class CacheReader:
    """Reads teacher outputs of views, in any process.

    Args:
        folder: The cache.
        manifest: What it holds.
        maps: Maps to read, in this order, each as often as it is named.
        logits: Whether to read logits.
    """

    def __init__(self, folder: Path, manifest: Manifest, maps: Sequence[TeacherMap], logits: bool) -> None:
        self.folder, self.manifest = folder.absolute(), manifest
        self.fields, self.logits = tuple(map(field_name, maps)), logits
        self._maps: dict[int, np.ndarray[Any, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}}  # each process maps the files itself

    def read(self, views: Sequence[View], images: Tensor) -> ViTOutput:
        """Returns the outputs of views: logits ``[B, K]`` or None, and the maps ``[B, C, H, W]``, as stored.

        Args:
            views: The views.
            images: Numbers ``[B]`` of the images that the student is shown for them.

        Raises:
            CacheError: If the teacher was shown another image.
        """
        places = [divmod(self.manifest.row(view), ROWS) for view in views]
        records = [(self._shard(shard), row) for shard, row in places]
        for view, ours, theirs in zip(views, images.tolist(), _gather(records, "image").tolist(), strict=True):
            if ours != theirs:
                raise CacheError(
                    f"For training image {view.image} the student is shown image {ours}, and the teacher was shown "
                    f"image {theirs} when the cache {str(self.folder)!r} was written: a file has come to harm, or has "
                    "been mended, since. Bring the files back as they were, or make another cache by `kdvit cache`."
                )
        found = {field: _gather(records, field) for field in dict.fromkeys(self.fields)}
        return ViTOutput(self._logits(records), tuple(found[field] for field in self.fields))

    def _shard(self, shard: int) -> np.ndarray[Any, Any]:
        if shard not in self._maps:
            if len(self._maps) == MAPS:
                self._maps.pop(next(iter(self._maps)))
            self._maps[shard] = self._mapped(shard_file(self.folder, shard))
        return self._maps[shard]

    def _mapped(self, file: Path) -> np.ndarray[Any, Any]:
        try:
            records = np.load(file, mmap_mode="r")
            if records.dtype == record_type(self.manifest):
                return np.asarray(records)
            fault = f"it holds {records.dtype}"
        except OSError:  # of the disk, or of too many open files
            raise
        except Exception as error:  # whatever numpy meets in a head that has come to harm
            fault = " ".join(str(error).split())[:200]
        raise CacheError(
            f"{str(file)!r} has come to harm: its head is none of this cache's ({fault}). Remove it, and the `kdvit "
            "cache` that made the cache writes it anew."
        )

    def _logits(self, records: list[tuple[np.ndarray[Any, Any], int]]) -> Tensor | None:
        if not self.logits or self.manifest.classes is None:
            return None
        values = _gather(records, "logits")
        if self.manifest.topk is None:
            return values
        return expand_logits(_gather(records, "classes").long(), values, self.manifest.classes)


def _gather(records: list[tuple[np.ndarray[Any, Any], int]], name: str) -> Tensor:
    first, _ = records[0]
    gathered = np.empty((len(records), *first.dtype[name].shape), first.dtype[name].base)
    for i, (shard, row) in enumerate(records):
        gathered[i] = shard[name][row]
    return torch.from_numpy(gathered)


def open_cache(
    folder: Path, teacher: FrozenTeacher | None, maps: Sequence[TeacherMap], logits: bool, data: dict[str, Any]
) -> CacheReader:
    """Opens a cache for a run, if it was made for just that.

    Where it lacks a target and holds the map, the run gets the map.

    Args:
        folder: The cache.
        teacher: The run's teacher.
        maps: Maps of the teacher that the run wants.
        logits: Whether it wants logits.
        data: Fingerprint of its training data.

    Raises:
        CacheError: If the cache is not complete, lacks something, or is of another origin; the message names what.
    """
    if teacher is None:
        raise CacheError("A cache of teacher outputs is given, and the run has no teacher. Leave data.cache out.")
    manifest = Manifest.load(folder)
    if missing := missing_shards(folder, manifest):
        raise CacheError(
            f"The cache {str(folder)!r} is not complete: {len(missing)} of {-(-manifest.rows // ROWS)} shards are "
            "missing or cut off. The `kdvit cache` that began it goes on where it stopped: `kdvit cache --config ... "
            f"--out {folder} --views {manifest.views}`."
        )
    chosen = [each if each in manifest.maps else TeacherMap(each.layer) for each in maps]
    lacking = [str(each) for each, found in dict(zip(maps, chosen, strict=True)).items() if found not in manifest.maps]
    lacking += ["logits"] if logits and manifest.classes is None else []
    if lacking:
        held = [*map(str, manifest.maps), *(["logits"] if manifest.classes is not None else [])]
        raise CacheError(
            f"The distillers want {', '.join(lacking)} of the teacher, which the cache {str(folder)!r} does not hold. "
            f"(It holds {', '.join(held)}.) Make one with the config of this run; --store both keeps whole maps, which "
            "serve students of any width and projector."
        )
    differences = differing(describe_origin(teacher, data), manifest.origin)
    if differences:
        seed = manifest.origin.get("data.seed")
        hint = (
            f" (--data.init_args.seed {seed} shows its views to students of any seed.)" if data["seed"] != seed else ""
        )
        raise CacheError(
            f"The cache {str(folder)!r} was made of something else: {'; '.join(differences)}. Train as it was made, or "
            f"make another by `kdvit cache`.{hint}"
        )
    return CacheReader(folder, manifest, chosen, logits)
