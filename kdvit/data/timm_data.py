"""Everything that timm reads, by its own names."""

from __future__ import annotations

import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from timm.data import ImageDataset, create_dataset

from kdvit.data.base import Split
from kdvit.data.images import Images


class TimmData(Images):
    """Images of a data set that `timm.data.create_dataset` makes.

    ``torch/cifar100``, ``hfds/NAME`` and folders and tar files are map-style; ``wds/``, ``hfids/NAME`` and
    ``tfds/NAME`` are streams, see `Images`.

    Args:
        name: timm's name; empty for a folder or tar file.
        root: Folder or file of the images. ``{split}`` in it stands for the name of the split.
        train: timm's name of the training split.
        val: The same of the validation split; null to set some training images apart.
        test: The same of the test split; null for none.
        download: Whether what is missing is downloaded, where timm can.
        args: More arguments of `create_dataset`, such as ``{target_key: fine_label}``.
        kwargs: Those of Images.

    Raises:
        ImportError: If the package that reads it is not installed.
        ValueError: If timm cannot make it, or takes training images for those of another split.
    """

    divides_evenly = True  # timm counts the images of a stream, and gives all processes as many

    def __init__(
        self,
        name: str = "",
        root: str | None = None,
        train: str = "train",
        val: str | None = "validation",
        test: str | None = None,
        download: bool = False,
        args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.timm_name, self.timm_root, self.args = name, root, {"download": download, **(args or {})}
        self.split_names = {"train": train, "val": val, "test": test}
        made = {split: self.create(split) for split, each in self.split_names.items() if each is not None}
        for split, data in made.items() if not name else ():
            ours, theirs = (Path(each.reader.root).resolve() for each in (made["train"], data))
            if split != "train" and (theirs == ours or theirs in ours.parents):
                raise ValueError(
                    f"TimmData: there is no {split} {self.split_names[split]!r} in {root!r}, and timm would show "
                    f"training images for it. Name its folder or file ({{split}} in root stands for it), or set "
                    f"{split} to null."
                )
        super().__init__(**made, **kwargs)

    def create(self, split: str, **streamed: Any) -> Any:
        """Returns timm's data set of a split, or what reads it where that is random access to files."""
        name = str(self.split_names[split])
        root = self.timm_root and self.timm_root.replace("{split}", name)
        try:
            made: Any = create_dataset(
                self.timm_name, root=root, split=name, is_training=split == "train", **{**self.args, **streamed}
            )
            return Readable(made.reader) if isinstance(made, ImageDataset) else made
        except ImportError as error:
            raise ImportError(f"TimmData {self.timm_name!r}: {error}. pip install 'kdvit[data]'.") from error
        except (AssertionError, KeyError, RuntimeError) as error:
            told = f"{self.timm_name!r}, split {name!r}, root {root!r}"
            raise ValueError(f"timm cannot read {told}: {error or type(error).__name__}") from error

    def stream(self, split: Split) -> Any:
        """Returns a stream anew: timm's readers see at their construction which of several processes they are in."""
        made = self.create(split, batch_size=self.batch_size, seed=self.seed)
        made.set_loader_cfg(num_workers=self.num_workers)
        return made


class Readable:
    """A random-access reader of timm's as a data set of open files; its `ImageDataset` shows others for damaged ones.

    Args:
        reader: The reader.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.class_to_idx = getattr(reader, "class_name_to_idx", None) or getattr(reader, "class_to_idx", None)
        self.targets: Any
        if hasattr(reader, "label_key"):
            self.targets = None if reader.remap_class else list(reader.dataset[reader.label_key])
        else:
            self.targets = reader.targets if hasattr(reader, "targets") else [target for _, target in reader.samples]

    def __len__(self) -> int:
        return len(self.reader)

    def filename(self, index: int) -> str | None:
        """Returns the name of an image, where it has one."""
        return self.reader.filename(index)  # type: ignore[no-any-return]

    def __getitem__(self, index: int) -> Any:
        if not hasattr(self.reader, "tar_state"):
            return self.reader[index]
        entry, _, inner = self.reader.samples[index]
        with ExitStack() as opened:  # anew: workers would share timm's open file, and its place
            tar: Any = opened.enter_context(tarfile.open(self.reader.root))
            if inner is not None:
                tar = opened.enter_context(tarfile.open(fileobj=tar.extractfile(inner)))
            return tar.extractfile(entry).read(), self.targets[index]
