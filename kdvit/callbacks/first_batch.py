"""What a run is trained on, as a picture."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kdvit.distillers.classes import first_difference, numbers_by_name
from kdvit.runtime.loggers import boards, card
from kdvit.structures import Batch, as_batch

CELL, LINE, COLUMNS = 160, 18, 4
"""Pixels of an image's longer side and of a line of text; images in a row."""
BLACK, BLUE, ORANGE = "#000000", "#0072B2", "#D55E00"
Line = tuple[str, str]
"""A text and its colour."""


class FirstBatch(pl.Callback):
    """Shows the first training images in TensorBoard: augmented and mixed, with label and each teacher's prediction.

    A prediction is blue where it is the label (of a mixed image, its larger part), else orange.

    Args:
        images: How many of the first batch.
    """

    def __init__(self, images: PositiveInt = 16) -> None:
        self.images = images

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Draws the first batch of a run, which by now is known to be one."""
        if trainer.current_epoch or batch_idx:
            return
        for board in boards(trainer):
            image, target = (each[: self.images] for each in as_batch(batch)[:2])
            mean, std = (torch.tensor(values).view(-1, 1, 1) for values in pl_module.image_format[1:3])
            pixels = (image.float().cpu() * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)
            lines = [_labels(target.cpu(), pl_module.class_names)] if pl_module.supervised else []
            lines += self._predictions(trainer, pl_module, as_batch(batch))
            board.add_image(card("data/first_batch"), picture(pixels, lines), 0, dataformats="HWC")

    def _predictions(self, trainer: pl.Trainer, pl_module: Any, batch: Batch) -> list[list[Line]]:
        """Returns what each teacher with logits says of each image."""
        target = batch.target[: self.images].cpu()
        labels = (target if target.ndim == 1 else target.argmax(dim=1)).tolist()
        ours = pl_module.class_names
        lines = []
        for teacher in pl_module.teachers.values():
            with _eager(pl_module.compiled), trainer.precision_plugin.forward_context():
                classes = teacher.output_shapes().classes
                logits = None if batch.teacher is None else batch.teacher.logits
                if logits is None and classes is not None:
                    logits = teacher(batch.image[: self.images]).logits
            if logits is None or classes is None:
                continue
            names, same = teacher.network.class_names, classes == pl_module.num_classes
            numbers = numbers_by_name(ours, names) if pl_module.supervised else None
            if pl_module.supervised and numbers is None and same and first_difference(ours, names) is None:
                numbers = list(range(classes))
            theirs = teacher.class_names(ours) or range(classes)
            shares, found = (each.tolist() for each in logits[: self.images].float().softmax(dim=1).max(dim=1))
            line = []
            for share, i, label in zip(shares, found, labels, strict=True):
                colour = BLACK if numbers is None else BLUE if i == numbers[label] else ORANGE
                line.append((f"{teacher.label}: {theirs[i]} ({share:.0%})", colour))
            lines.append(line)
        return lines


def _eager(compiled: str) -> Any:
    """Lets a compiled teacher run as it is: to compile it once more, for these few images, takes a minute."""
    return torch.compiler.set_stance("force_eager") if compiled in ("teacher", "both") else nullcontext()


def _labels(target: Tensor, names: Any) -> list[Line]:
    """Returns the label of each image, of class indices ``[B]`` or of the two parts in probabilities ``[B, K]``."""
    if target.ndim == 1:
        return [(str(names[i] if names else i), BLACK) for i in target.tolist()]
    shares, classes = (each.tolist() for each in target.topk(2))
    parts = (zip(*pair, strict=True) for pair in zip(shares, classes, strict=True))
    return [
        (" + ".join(f"{names[i] if names else i} ({share:.0%})" for share, i in each if share > 0), BLACK)
        for each in parts
    ]


def picture(image: Tensor, lines: list[list[Line]]) -> np.ndarray[Any, Any]:
    """Draws images in rows of four, with lines of text below each.

    Args:
        image: ``[B, 3, H, W]`` in 0..1.
        lines: The texts of all images, a list for each line.

    Returns:
        Pixels ``[H, W, 3]``, uint8.
    """
    font = ImageFont.load_default(size=LINE - 5)
    scale = CELL / max(image.shape[2:])
    height, width = (round(scale * side) for side in image.shape[2:])
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    step_x, step_y = CELL + 8, height + LINE * len(lines) + 12
    sheet = Image.new("RGB", (COLUMNS * step_x, -(-len(image) // COLUMNS) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for number, pixels in enumerate((255 * image).round().byte().permute(0, 2, 3, 1).numpy()):
        left, top = number % COLUMNS * step_x + 4, number // COLUMNS * step_y + 4
        sheet.paste(Image.fromarray(pixels).resize((width, height), how), (left, top))
        for row, texts in enumerate(lines):
            text, colour = texts[number]
            while font.getlength(text) > CELL:
                text = f"{text.removesuffix('...')[:-1]}..."
            draw.text((left, top + height + LINE * row), text, colour, font)
    return np.asarray(sheet)
